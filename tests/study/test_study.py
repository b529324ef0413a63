"""A real study from end to end: stopped by SIGTERM, gone on with, repeated, verified; and one whose training fails."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small_data import small_config, write_config, write_small

from coe_dist.config import load_config
from coe_dist.errors import InputError, Preempted, TrainingError
from coe_dist.study.command import run_study
from coe_dist.study.results import Results
from coe_dist.study.schema import load_study
from coe_dist.study.study import Limits
from coe_dist.study.trainings import Training, trainings_of
from coe_dist.tracking import read_metrics
from coe_dist.tracking.store import connect

WILD = ["training.optimizer.learning_rate=1e30", "training.optimizer.warmup_epochs=0"]  # diverges
TAME = "[!w]*"  # the other curves


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two single networks and a collaboration, one seed, one epoch of 101 images."""
    folder = tmp_path_factory.mktemp("study")
    data = write_small(folder / "data")
    base = small_config(data, folder / "runs", training={"epochs": 1}, tracking={"enabled": True})
    base["data"]["loader"] = "torchvision"  # without FFCV, whose pipelines take seconds to compile in each process
    write_config(folder / "base.yaml", base)
    study = {
        "name": "tiny",
        "base": "base.yaml",
        "seeds": [0],
        "parallel": 1,
        "results": str(folder / "results"),
        "curves": {
            "single": {"kind": "single", "points": {"a": [], "b": ["experts.options.width=0.2"]}},
            "search": {
                "kind": "collaboration",
                "test": False,
                "start": {"teacher": "single/b"},
                "points": {"a": ["distillation={teacher: small_cnn, weights: start}"]},
            },
            "wild": {"kind": "single", "points": {"a": WILD}},
            "coe": {"kind": "collaboration", "points": {"a": []}},
        },
        "frontier": {"single": ["single"], "collaborations": ["coe"], "draws": 100},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def runs_of(folder: Path) -> list[Any]:
    """MLflow's."""
    client = connect(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name("tiny").experiment_id]))


def rows_of(folder: Path) -> Results:
    return Results(folder / "results", "tiny")


@pytest.fixture(scope="module")
def stopped(folder: Path) -> dict[str, Any]:
    """The study, ended by a SIGTERM when its first training is finished: what it said and left."""
    said: list[str] = []

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not rows_of(folder).rows and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Preempted, match="study tiny: stopped; the same command goes on from there"):
        run_study(str(folder / "tiny.yaml"), say=said.append)
    thread.join()
    return {"said": said, "rows": rows_of(folder).rows}


@pytest.fixture(scope="module")
def lines(folder: Path, stopped: dict[str, Any]) -> list[str]:
    """What the same command says when it is given again and goes on to the end."""
    lines: list[str] = []
    with pytest.raises(TrainingError, match=r"1 trainings failed; wild/a seed 0: step \d+: a gradient is not finite"):
        run_study(str(folder / "tiny.yaml"), say=lines.append)
    return lines


def test_sigterm_keeps_what_is_finished(folder: Path, stopped: dict[str, Any]) -> None:
    assert stopped["said"][0] == (
        "study tiny: 5 of 5 trainings are left, 1 at a time, about 0 minutes (by counted MACs)"
    )
    assert 1 <= len(stopped["rows"]) < 4
    assert (folder / "results" / "tiny.md").is_file()
    assert {run.info.status for run in runs_of(folder)} == {"FINISHED", "KILLED"}
    children = [child.cmdline() for child in psutil.Process().children()]
    assert not any("coe_dist.study.slot" in words for words in children)  # the training process ended too


def test_the_same_command_goes_on(folder: Path, stopped: dict[str, Any], lines: list[str]) -> None:
    done = len(stopped["rows"])
    assert lines[0].startswith(f"study tiny: {5 - done} of 5 trainings are left, 1 at a time")
    assert f"(by {done} finished trainings)" in lines[0]
    assert lines[1].startswith(f"[{done + 1}/5] ")
    rows = rows_of(folder).rows
    assert rows[:done] == stopped["rows"]
    # the one that failed ended only itself
    assert [row.label for row in rows] == ["single/a", "single/b", "search/a", "coe/a"]
    assert "failed: wild/a seed 0: step " in lines[-2]


def test_rows_are_the_evaluations(folder: Path, lines: list[str]) -> None:
    results = rows_of(folder)
    for row in results.rows:
        run = folder / "runs" / f"tiny.{row.curve}.{row.point}.seed0"
        validation = json.loads((run / "evaluation-validation.json").read_text())
        tested = (run / "evaluation-test.json").is_file()
        assert tested == (row.curve != "search") == (row.test_top1 is not None)  # a search does not look at test
        if row.curve == "single":
            assert (row.full_val_top1, row.macs) == (pytest.approx(validation["top1"]), validation["macs"])
            continue
        assert row.full_val_top1 == pytest.approx(validation["top1"]["coe"])
        lines = results.curve_of(row.config)
        assert len(lines) == len(validation["curve"])
        chosen = next(line for line in lines if line.threshold == row.threshold)
        assert chosen.val_top1 >= row.full_val_top1
        assert row.val_top1 == chosen.val_top1
        assert row.macs == (chosen.test_macs if tested else chosen.val_macs)


def test_a_curve_learns_from_its_teacher(folder: Path, lines: list[str]) -> None:
    run = folder / "runs" / "tiny.search.a.seed0"
    config = load_config(run / "config.yaml")
    assert config.distillation is not None
    assert config.distillation.options == {"width": 0.2}
    weights = Path(config.distillation.weights)
    assert (weights.parents[2].name, weights.name) == ("tiny.single.b.seed0", "single.safetensors")
    assert max(record["metrics"].get("train/loss_distillation", 0.0) for record in read_metrics(run)) > 0


def test_each_training_is_an_mlflow_run_below_the_studys(folder: Path, lines: list[str]) -> None:
    runs = runs_of(folder)
    (parent,) = (run for run in runs if run.data.tags["kind"] == "study")
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert all({"host", "world_size"} <= run.data.tags.keys() for run in children)
    assert all(
        {used.dataset.name.split()[-1] for used in run.inputs.dataset_inputs} >= {"train", "test"} for run in children
    )
    ended = {f"{run.data.tags['curve']}/{run.data.tags['point']}": run for run in children}
    assert len(children) == len(ended) == 5  # also where one was cut short and done again
    assert {label for label, run in ended.items() if run.info.status == "FINISHED"} == ended.keys() - {"wild/a"}
    assert ended["wild/a"].info.status == parent.info.status == "FAILED"
    for row in rows_of(folder).rows:
        metrics = ended[row.label].data.metrics
        assert metrics["study/val_top1"] == pytest.approx(row.val_top1)
        assert "train/loss" in metrics
        assert ("study/test_top1" in metrics) == (row.test_top1 is not None)


def test_a_finished_study_trains_nothing(folder: Path, lines: list[str]) -> None:
    said: list[str] = []
    before = (folder / "results" / "tiny.csv").stat().st_mtime_ns
    summary = run_study(str(folder / "tiny.yaml"), only=TAME, say=said.append)
    assert said == []
    assert (folder / "results" / "tiny.csv").stat().st_mtime_ns == before
    assert (summary["finished"], summary["trainings"], summary["failed"]) == (4, 5, [])
    found = summary["frontier"]
    assert (found["complete"], found["seeds"], len(found["single"]), len(found["collaborations"])) == (True, [0], 2, 1)
    assert found == json.loads((folder / "results" / "tiny.json").read_text())
    for path in summary["files"]:
        assert Path(path).stat().st_size > 0
    assert "</svg>" in (folder / "results" / "tiny.svg").read_text()


def test_a_finished_study_says_so_when_asked_what_is_left(folder: Path, lines: list[str]) -> None:
    said: list[str] = []
    run_study(str(folder / "tiny.yaml"), only=TAME, dry_run=True, say=said.append)
    assert said == ["study tiny: nothing is left of 4 trainings"]


def test_a_training_comes_out_again_bit_for_bit(folder: Path, lines: list[str]) -> None:
    said: list[str] = []
    answers = run_study(str(folder / "tiny.yaml"), verify=True, say=said.append)["verify"]
    assert [answer["curve"] for answer in answers] == ["single", "search", "coe"]
    assert all(answer["equal"] and answer["verified"] for answer in answers)
    assert said[0].startswith("study tiny: 3 trainings again, 1 at a time, about ")
    assert [line.split("]")[0] for line in said[1:]] == ["[1/3", "[2/3", "[3/3"]
    assert all(line.endswith("every figure as before") for line in said[1:])


def test_what_it_costs_to_verify_is_said_without_training(folder: Path, lines: list[str]) -> None:
    said: list[str] = []
    before = {run: run.stat().st_mtime_ns for run in (folder / "runs").iterdir()}
    summary = run_study(str(folder / "tiny.yaml"), only="coe", verify=True, dry_run=True, say=said.append)
    assert [line.split(",")[0] for line in said] == ["study tiny: 1 training again"]
    assert summary["verify"] == []
    assert {run: run.stat().st_mtime_ns for run in (folder / "runs").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"runs": -1}}, "--max-runs: -1 is not allowed"),
        ({"limits": {"minutes": 0.0}}, "--max-minutes: 0.0 is not allowed"),
        ({"only": "cow"}, "--only: 'cow' is not allowed; it matches none of single/a"),
        ({"seeds": [7], "verify": True}, "--verify: nothing is finished in "),
        ({"limits": {"minutes": 1.0}, "verify": True}, "--verify: not allowed with --max-runs or --max-minutes"),
    ],
)
def test_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    def run(limits: dict[str, Any] | None = None, **others: Any) -> None:
        run_study(str(folder / "tiny.yaml"), limits=Limits(**limits or {}), say=lambda line: None, **others)

    with pytest.raises(InputError, match=message):
        run(**options)


def test_a_collaboration_starts_from_a_single_network(folder: Path, lines: list[str]) -> None:
    study = yaml.safe_load((folder / "tiny.yaml").read_text())
    start = {"kind": "collaboration", "overrides": ["experts.initial_noise=0"], "points": {"a": []}}
    curves = {"single": study["curves"]["single"], "wild": study["curves"]["wild"]}
    curves |= {"good": {**start, "start": {"experts": "single/a"}}, "lost": {**start, "start": {"experts": "wild/a"}}}
    changes = {"name": "started", "curves": curves, "frontier": None, "parallel": 2}
    (folder / "started.yaml").write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    said: list[str] = []
    with pytest.raises(TrainingError, match="2 trainings failed; wild/a seed 0"):
        run_study(str(folder / "started.yaml"), only="[gl]*", say=said.append)
    assert said[0].startswith("study started: 2 of 2 trainings and 2 to start from are left")
    assert [row.label for row in Results(folder / "results", "started").rows] == ["single/a", "good/a"]
    assert "failed: lost/a seed 0: lost/a starts or learns from wild/a seed 0, which failed" in said
    weights = folder / "runs" / "started.good.a.seed0" / "config.yaml"
    assert yaml.safe_load(weights.read_text())["experts"]["initial_weights"].endswith("/single.safetensors")
    answers = run_study(str(folder / "started.yaml"), only="good", verify=True, say=said.append)["verify"]
    assert [(answer["curve"], answer["equal"]) for answer in answers] == [("good", True)]

    def first(**changes: Any) -> Training:
        (folder / "changed.yaml").write_text(yaml.safe_dump({**study, "name": "started", **changes}, sort_keys=False))
        return trainings_of(load_study(folder / "changed.yaml"), only="single/a")[0]

    assert first().weights is not None
    assert first(overrides=["training.epochs=2"]).weights is None  # the same folder, but trained with other settings
