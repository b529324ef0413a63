"""Real Ray Train runs on two workers: what they find, and what comes of their failures."""

import json
import os
from pathlib import Path

import pytest
from namespaces import scenario

from coe_dist.config import parse_config
from coe_dist.errors import InputError
from coe_dist.orchestration.ray_train import run_under_ray
from coe_dist.orchestration.shares import check_workers
from coe_dist.resources import usable_cores
from coe_dist.training.job import Job

SCENARIO = Path(__file__).with_name("scenario_session.py")
NO_START = Path(__file__).with_name("scenario_no_start.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All runs of one session: Ray takes seconds to start, so they share one."""
    folder = tmp_path_factory.mktemp("session")
    return {**scenario(SCENARIO, folder=folder), "folder": folder}


def test_workers_find_torchruns_environment_and_a_working_group(found):
    assert found["add_up"]["error"] is None
    for rank in range(2):
        seen = json.loads((found["folder"] / "add_up" / f"rank-{rank}.json").read_text())
        assert seen["total"] == 3.0
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert (seen["MASTER_ADDR"], seen["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
        assert (seen["OMP_NUM_THREADS"], seen["threads"], seen["NUMBA_THREADING_LAYER"]) == ("2", 2, "omp")
        assert seen["directory"] == str(found["folder"])


def test_worker_output_is_kept_and_warnings_reach_the_driver(found):
    for rank in range(2):
        text = (found["folder"] / "add_up" / "logs" / f"rank-{rank:04d}.log").read_text()
        assert text.count("printed by the worker") == 1
        assert text.count("printed by its child") == 1
    heard = [line for line in found["heard"] if "logged by" in line]
    assert sorted(heard) == ["rank 0: logged by rank 0", "rank 1: logged by rank 1"]


def test_first_failure_is_named_and_traceback_kept(found):
    assert found["break"] == {"error": "TrainingError", "message": "rank 1: KeyError: 'the cause'"}
    account = (found["folder"] / "break" / "error.txt").read_text()
    assert "==== rank 1 ====" in account
    assert "in break_on_rank_1" in account


def test_bad_input_surfaces_as_such_without_using_up_restarts(found):
    assert found["refuse"] == {"error": "InputError", "message": "data.folder: nowhere is not allowed; give a folder"}
    assert (found["folder"] / "refuse" / "attempts-1").read_text() == "x"


def test_dead_worker_is_named(found):
    assert found["die"]["error"] == "TrainingError"
    assert found["die"]["message"].startswith("the process of rank 1 ended unexpectedly: ")
    assert "\n" not in found["die"]["message"]


def test_more_than_the_session_has_is_refused_with_what_is_there(found):
    cores = found["session"]["cpus"]
    assert found["too_many"]["error"] == "InputError"
    assert found["too_many"]["message"].startswith(f"workers.count: {cores + 1:g} is not allowed; this machine has ")
    assert found["gpu"]["error"] == "InputError"
    assert "has 0 GPUs; set workers.device: cpu" in found["gpu"]["message"]


def test_nothing_of_ray_stays_in_the_run_folder(found):
    assert not list(found["folder"].glob("*/ray"))


def test_too_many_workers_are_refused_before_ray_starts(tmp_path):
    cores = usable_cores()
    config = parse_config({"name": "big", "workers": {"count": cores + 6, "device": "cpu"}})
    expected = (
        rf"workers.count: {cores + 6} is not allowed; this machine has {cores} cores?; give at most {cores} or set"
    )
    with pytest.raises(InputError, match=expected):
        check_workers(config)
    with pytest.raises(InputError, match=expected):
        run_under_ray(lambda job: None, Job(task="train", config=config, run_dir=str(tmp_path)))
    assert not os.listdir(tmp_path)


def test_oversubscription_is_allowed_when_asked_for():
    check_workers(parse_config({"name": "big", "workers": {"count": 64, "oversubscribe": True, "device": "cpu"}}))


@pytest.mark.full
def test_ray_that_does_not_start_is_tried_once_more(tmp_path):
    found = scenario(NO_START, "1", folder=tmp_path)
    assert (found["cpus"], found["message"], found["left"]) == (usable_cores(), None, [])
    (line,) = found["heard"]
    assert line.startswith("ray: it did not start on this machine; The current node timed out")
    assert line.endswith("; once more")


@pytest.mark.full
def test_ray_that_never_starts_is_said_in_one_line_and_leaves_nothing(tmp_path):
    found = scenario(NO_START, "2", folder=tmp_path)
    assert found["message"].startswith("ray: it did not start on this machine; The current node timed out")
    assert found["left"] == []
