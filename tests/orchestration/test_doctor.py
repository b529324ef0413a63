"""The doctor: components that work, hang, crash or are missing."""

import io
import json
import sys
from pathlib import Path

import pytest
from namespaces import clean_environment, in_private_network
from rich.console import Console

from coe_dist.orchestration.advice import advice_for
from coe_dist.orchestration.doctor import run_probe, versions
from coe_dist.orchestration.doctor_tables import show
from coe_dist.orchestration.probes import PROBES
from coe_dist.orchestration.processes import marked_processes, marking, new_mark


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The real doctor on this machine, in a network of its own."""
    folder = tmp_path_factory.mktemp("doctor")
    code = "import json; from coe_dist.orchestration.doctor import collect; print(json.dumps(collect()))"
    done = in_private_network(
        [sys.executable, "-c", code], env=clean_environment(XDG_STATE_HOME=str(folder)), cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_component_really_works_here(findings):
    assert [probe["name"] for probe in findings["probes"]] == list(PROBES)
    assert [(probe["name"], probe["problem"]) for probe in findings["probes"] if not probe["ok"]] == []
    assert findings["ok"] is True
    assert "gloo" in findings["machine"]["distributed_backends"]
    assert findings["machine"]["cores"] >= 1
    assert all(findings["versions"].values())


def test_tables_name_everything(findings):
    broken = {"name": "FFCV", "ok": False, "seconds": 1.0, "problem": "[red]odd[/red] text", "advice": "do this"}
    output = io.StringIO()
    show(findings | {"probes": [broken], "versions": {"ray": None}}, Console(file=output, width=120))
    for text in ("[red]odd[/red] text", "-> do this", "fails", "missing", "usable of"):
        assert text in output.getvalue()


def test_ffcv_version_is_that_of_the_package():
    assert versions()["ffcv"].startswith("1.0.")


HANGING = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""


def test_hanging_probe_is_ended_with_its_children():
    mark = new_mark()
    with marking(mark):
        result = run_probe("Ray", timeout_seconds=2.0, command=[sys.executable, "-c", HANGING])
    assert (result["ok"], result["problem"]) == (False, "no answer within 2 s")
    assert "hangs" in result["advice"]
    assert marked_processes(mark) == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.abort()", "crashed with SIGABRT"),
        ("raise OSError('libturbojpeg.so.0: cannot open shared object file')", "OSError: libturbojpeg.so.0: cannot"),
        ("import sys; sys.exit(5)", "ended with exit code 5"),
    ],
)
def test_failures_are_described(code, problem):
    result = run_probe("FFCV", timeout_seconds=60.0, command=[sys.executable, "-c", code])
    assert result["ok"] is False
    assert result["problem"].startswith(problem)
    assert result["advice"]


def test_output_before_the_answer_does_no_harm():
    code = "import json; print('noise'); print('{}'); print(json.dumps({'gpus': ['x']}))"
    result = run_probe("FFCV", timeout_seconds=60.0, command=[sys.executable, "-c", code])
    assert (result["ok"], result["told"]) == (True, {"gpus": ["x"]})


def test_stale_build_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    assert "pytorch#189245" not in advice_for("DeepSpeed", "no answer within 180 s", "")
    lock.parent.mkdir(parents=True)
    lock.touch()
    advice = advice_for("DeepSpeed", "no answer within 180 s", "")
    assert "pytorch#189245" in advice
    assert str(lock) in advice


@pytest.mark.parametrize(
    ("name", "problem", "word"),
    [
        ("FFCV", "ImportError: libopencv_imgproc.so.406: cannot open shared object file", "libopencv"),
        ("FFCV", "ModuleNotFoundError: No module named 'ffcv._libffcv'", "g++"),
        ("MLflow", "ModuleNotFoundError: No module named 'mlflow'", "pip install"),
        ("MLflow", "OperationalError: unable to open database file", "tracking.uri"),
        ("Ray", "ConnectionError: connection refused", "firewall"),
        ("DeepSpeed", "crashed with SIGKILL", "memory"),
        ("Ray", "something nobody foresaw", "coe_dist.orchestration.probes Ray"),
    ],
)
def test_advice(name, problem, word):
    assert word in advice_for(name, problem, "")


def test_probes_leave_the_working_directory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_probe("MLflow", timeout_seconds=120.0)["problem"] is None
    assert list(Path(tmp_path).iterdir()) == []
