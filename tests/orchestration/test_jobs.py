"""`coe-dist launch`, `jobs`, `logs` and `stop` on a real Ray head; what is uploaded, and what is refused before."""

from pathlib import Path

import pytest
from namespaces import ROOT, scenario
from small_data import write_small

from coe_dist.config import load_config
from coe_dist.errors import InputError
from coe_dist.orchestration.job_package import EXCLUDED, check_size, package_settings, uploaded_files
from coe_dist.orchestration.launching import environment_of
from coe_dist.orchestration.places import placed_in
from coe_dist.tracking.store import connect

SCENARIO = Path(__file__).with_name("scenario_jobs.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    data = write_small(folder / "data")
    return {**scenario(SCENARIO, folder, data, ROOT, folder=folder), "folder": folder}


def test_a_launch_can_be_left_and_the_run_goes_on(found):
    assert found["detached"]["code"] == 130
    assert "launched first as coe-first~1 on http://127.0.0.1:8265" in found["detached"]["err"]
    assert "detached; first goes on" in found["detached"]["err"]
    assert "Running entrypoint for job coe-first~1: exec " in found["detached"]["out"]
    assert [(row["run"], row["attempt"], row["status"]) for row in found["running"]] == [("first", 1, "RUNNING")]


def test_a_run_is_never_launched_twice_at_once(found):
    assert found["again"]["code"] == 0
    assert found["again"]["err"].startswith("first is running already (attempt 1)")
    assert found["other"]["code"] == 2
    assert found["other"]["err"] == (
        "coe-dist: name: first is running on http://127.0.0.1:8265 with other settings; give another --name, or "
        "coe-dist stop first first\n"
    )


def test_stop_saves_and_the_next_launch_goes_on_from_there(found):
    assert (found["stop"]["code"], found["stop"]["out"]) == (
        0,
        "first is stopped; the same coe-dist launch resumes it\n",
    )
    assert found["stop_again"]["out"] == "first does not run (attempt 1 stopped)\n"
    assert found["resumed"]["code"] == 0, found["resumed"]
    assert "first: attempt 2; attempt 1 has stopped, it is resumed" in found["resumed"]["err"]
    assert found["starts"] == [0, found["stopped_at"]]
    assert found["steps"] == found["expected_steps"]
    assert "test top-1" in " ".join(found["resumed"]["out"].split()) or "top-1" in found["resumed"]["out"]


def test_one_mlflow_run_has_both_attempts(found):
    client = connect(f"sqlite:///{found['folder'] / 'shared' / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")


def test_a_failing_job_gives_its_own_code_and_line(found):
    assert found["failing"]["code"] == 2
    assert "data/fashion-mnist/train.beton: no such file" in found["failing"]["out"]
    assert "data/fashion-mnist/train.beton: no such file" in found["logs"]["out"]
    assert found["logs"]["code"] == 0


def test_jobs_lists_every_attempt(found):
    rows = [(row["run"], row["attempt"], row["status"], row["exit_code"]) for row in found["jobs"]]
    assert rows == [
        ("first", 1, "STOPPED", None),
        ("first", 2, "SUCCEEDED", 0),
        ("failing", 1, "FAILED", 2),
    ]
    assert all(row["started"] <= row["ended"] for row in found["jobs"])
    assert "succeeded" in found["table"]["out"]


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("nowhere", "address: http://127.0.0.1:9 is not reachable ([Errno 111] Connection refused); is a Ray head's "),
        ("ftp", "address: 'ftp://127.0.0.1:8265' is not allowed; give the dashboard of a Ray head"),
        ("token", "address: http://127.0.0.1:8265 asks for a token and refused that of RAY_AUTH_TOKEN; set "),
        ("env", "--env: NOT_SET_ANYWHERE is not set here; give NOT_SET_ANYWHERE=VALUE"),
        ("unknown", "name: no run 'nobody' was launched on http://127.0.0.1:8265; launched there: "),
        ("other_server", "address: http://127.0.0.1:"),
    ],
)
def test_refusals_are_one_line(found, case, line):
    answer = found["refusals"][case]
    assert answer["code"] == 2, answer
    (only,) = answer["err"].splitlines()
    assert only.startswith(f"coe-dist: {line}")
    assert answer["out"] == ""


def test_a_head_that_is_gone_is_told(found):
    assert found["head_gone"]["code"] == 2
    assert "is not reachable" in found["head_gone"]["err"]


def test_what_travels_is_the_code(tmp_path):
    for name in (
        "coe_dist/data/loader.py",
        "configs/smoke.yaml",
        ".git/objects/ab/cd",
        ".venv/bin/python",
        "data/fashion-mnist/train.beton",
        "runs/first/metrics.jsonl",
        "results/first/metrics.jsonl",
        "coe_dist/__pycache__/cli.pyc",
        ".mypy_cache/x",
        "notes/secret.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    (tmp_path / ".rayignore").write_text("notes\n")
    config = load_config(ROOT / "configs/smoke.yaml", ["runs_dir=results"])
    settings = package_settings(tmp_path, config)
    assert settings["working_dir"] == str(tmp_path)
    packed = {path.relative_to(tmp_path).as_posix() for _, path in uploaded_files(tmp_path, settings["excludes"])}
    assert packed == {"coe_dist/data/loader.py", "configs/smoke.yaml", ".rayignore"}


def test_too_much_is_refused_and_the_largest_named(tmp_path):
    for name, size in (("a.bin", 3), ("b/c.bin", 9), ("d.txt", 1), ("e.txt", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size * 2**20))
    files = uploaded_files(tmp_path, EXCLUDED)
    check_size(files, tmp_path, 14 * 2**20)
    with pytest.raises(InputError, match=r"14 MiB in 4 files .* at most 13 MiB .* b/c.bin \(9 MiB\), a.bin \(3 MiB\)"):
        check_size(files, tmp_path, 13 * 2**20)


def test_variables_of_the_job(monkeypatch):
    monkeypatch.setenv("FROM_HERE", "a=b")
    assert environment_of(["A=1", "B=", "C=x=y", "FROM_HERE"]) == {"A": "1", "B": "", "C": "x=y", "FROM_HERE": "a=b"}
    with pytest.raises(InputError, match=r"--env: '1A' is not allowed"):
        environment_of(["1A=2"])


def test_relative_paths_lie_in_the_clusters_folder(tmp_path):
    config = load_config(ROOT / "configs/smoke.yaml", ["experts.initial_weights=w.pth", "tracking.uri=sqlite:///a.db"])
    placed = placed_in(config, tmp_path)
    assert placed.run_dir == tmp_path / "runs" / "smoke"
    assert placed.data.folder == str(tmp_path / "data/fashion-mnist")
    assert placed.experts.initial_weights == str(tmp_path / "w.pth")
    assert placed.tracking.uri == f"sqlite:///{tmp_path}/a.db"
    assert placed_in(placed, Path("/elsewhere")) == placed
    stored = load_config(ROOT / "configs/smoke.yaml", ["data.folder=s3://bucket/data", "data.staging.folder=copies"])
    placed = placed_in(stored, tmp_path)
    assert placed.data.folder == "s3://bucket/data"
    assert placed.data.staging.folder == str(tmp_path / "copies")
