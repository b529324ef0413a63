"""An elastic run on a cluster whose machines come and go: each image once an epoch, one MLflow run, no endless wait."""

import json
from bisect import bisect
from collections import Counter
from pathlib import Path

import pytest
from namespaces import scenario
from small_data import IMAGES, small_config, write_config, write_small

from coe_dist.config import parse_config
from coe_dist.errors import InputError
from coe_dist.orchestration.ray_session import RaySession
from coe_dist.orchestration.shares import Share, check_workers, share_of
from coe_dist.tracking import read_metrics
from coe_dist.tracking.store import connect

SCENARIO = Path(__file__).with_name("scenario_elastic.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    content = small_config(
        write_small(folder / "data"),
        folder / "runs",
        training={"epochs": 100_000, "checkpoint_every_steps": 3, "evaluate_every": 100_000},
        workers={"min": 1, "max": 2, "device": "cpu", "max_failures": 3},
        tracking={"enabled": True, "every_steps": 1},
    )
    told = scenario(
        SCENARIO,
        write_config(folder / "config.yaml", content),
        folder=folder,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="0123456789abcdef" * 4,
        RAY_USAGE_STATS_ENABLED="0",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3",
    )
    return {**told, "run": folder / "runs" / "run"}


def test_workers_follow_the_machines(found):
    assert "problem" not in found["machines"]
    print({name: round(value, 1) for name, value in found["machines"].items() if name.endswith("seconds")})
    assert found["machines"]["worlds"][0::2] == [2, 2]
    starts = [record for record in read_metrics(found["run"]) if record["kind"] == "start"]
    assert [start["world_size"] for start in starts] == [2, 1, 2]
    assert found["preempted"] is not None


def test_what_happened_is_told_in_one_line_each(found):
    died, grew = (line for line in found["heard"] if "restarting" in line)
    assert died.endswith("restarting from the newest checkpoint, failure 1 of 3")
    assert grew == "room for 2 workers instead of 1; restarting from the checkpoint just saved"


def test_every_image_is_used_once_an_epoch_whatever_the_number_of_workers(found):
    """Of the batches that a later start repeats, only the last repetition is in the weights."""
    # a start is recorded when all of its ranks have met, so each rank's file is begun before its own start's record
    recorded = [record["time"] for record in read_metrics(found["run"]) if record["kind"] == "start"]
    used = {}
    for path in sorted(found["run"].glob("ids-*.jsonl")):
        start = bisect(recorded, float(path.stem.split("-")[1]))
        for line in path.read_text().splitlines():
            epoch, number, ids = json.loads(line)
            used.setdefault((epoch, number), {}).setdefault(start, Counter()).update(ids)
    complete = found["preempted"] // 4
    assert complete >= 2
    for epoch in range(complete):
        counted = Counter()
        for number in range(4):
            counted += used[epoch, number][max(used[epoch, number])]
        assert counted == Counter(range(IMAGES)), f"epoch {epoch}"


def test_steps_go_on_from_the_newest_save(found):
    done = 0
    for record in read_metrics(found["run"]):
        if record["kind"] == "start":
            assert done - 6 <= record["step"] <= done  # one save in three steps, one being written
            done = record["step"]
        elif record["kind"] == "train":
            done += 1
            assert (record["step"], record["epoch"]) == (done, (done - 1) // 4)
    assert done == found["preempted"]


def test_one_mlflow_run_has_all_steps(found):
    client = connect(f"sqlite:///{found['run'].parent / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    # and perhaps some that were lost with a machine and not reached again
    assert {metric.step for metric in history} >= set(range(1, found["preempted"] + 1))


@pytest.mark.parametrize("kind", ["fixed", "elastic"])
def test_occupied_cores_are_not_waited_for_for_ever(found, kind):
    assert found[kind]["error"] == "TrainingError"
    fewest = "2 cores" if kind == "fixed" else "1 core"
    assert found[kind]["message"] == (
        f"no room for the workers: they need {fewest}; the cluster at {found['address']} has 2 cores, of which 0 are "
        "free; wait for other work to end, or lower the number of workers"
    )


def config_of(**workers):
    return parse_config({"name": "run", "workers": {"device": "cpu", **workers}})


@pytest.mark.parametrize(
    ("workers", "local", "cores", "share"),
    [
        ({"count": 3}, True, 4, Share(3, 3, 1.0, 0.0)),
        ({"count": 3, "oversubscribe": True}, True, 2, Share(3, 3, 0.6666, 0.0)),
        ({"min": 1, "max": 8}, True, 4, Share(1, 4, 1.0, 0.0)),
        ({"min": 1, "max": 8}, False, 4, Share(1, 8, 1.0, 0.0)),
        ({"min": 4, "max": 8}, True, 4, Share(4, 4, 1.0, 0.0)),
        ({"min": 3, "max": 6, "oversubscribe": True}, True, 2, Share(3, 6, 0.25, 0.0)),
        ({"min": 1, "max": 64, "oversubscribe": True}, True, 2, Share(1, 32, 0.0625, 0.0)),
    ],
)
def test_shares(workers, local, cores, share):
    given = share_of(config_of(**workers), RaySession("somewhere:1", local, cores, 0.0))
    assert given == share
    assert given.cpus * (given.most if local else given.fewest) <= cores
    assert given.num_workers == (share.most if share.fewest == share.most else (share.fewest, share.most))


def test_too_few_gpus_are_told(caplog):
    config = parse_config({"name": "run", "workers": {"count": 2}})
    assert share_of(config, RaySession("somewhere:1", True, 4.0, 1.0)) == Share(2, 2, 1.0, 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the workers use CPU cores: workers.count is 2, but this machine has 1 GPU; "
        "with workers.device=gpu that is refused"
    ]
    caplog.clear()
    share_of(config, RaySession("somewhere:1", True, 4.0, 2.0))
    share_of(config, RaySession("somewhere:1", True, 4.0, 0.0))
    assert caplog.records == []


def test_a_cluster_may_have_yet_to_start_its_machines():
    empty = RaySession("somewhere:1", False, 0.0, 0.0)
    assert share_of(config_of(count=3, wait_minutes=1), empty) == Share(3, 3, 1.0, 0.0)
    assert share_of(config_of(count=3, wait_minutes=1, device="gpu"), empty) == Share(3, 3, 1.0, 1.0)
    assert share_of(config_of(min=1, max=4, wait_minutes=1), empty) == Share(1, 4, 1.0, 0.0)
    with pytest.raises(InputError, match=r"^workers.count: 3 is not allowed; the cluster at somewhere:1 has 0 cores"):
        share_of(config_of(count=3), empty)
    with pytest.raises(InputError, match=r"^workers.count: 999 is not allowed; this machine has"):
        check_workers(config_of(count=999, wait_minutes=1))
    with pytest.raises(InputError, match=r"^workers.wait_minutes: 1.0 is not allowed; workers.oversubscribe waits"):
        config_of(wait_minutes=1, oversubscribe=True)


@pytest.mark.parametrize(("gpus", "share"), [(0.0, Share(1, 2, 1.0, 0.0)), (1.0, Share(1, 1, 1.0, 1.0))])
def test_elastic_workers_take_the_gpus_there_are(gpus, share):
    config = parse_config({"name": "run", "workers": {"min": 1, "max": 2}})
    assert share_of(config, RaySession("somewhere:1", True, 4.0, gpus)) == share


def test_too_large_a_minimum_is_refused():
    with pytest.raises(
        InputError, match=r"^workers.min: 999 is not allowed; this machine has \d+ cores?; give at most"
    ):
        check_workers(config_of(min=999, max=1000))
    session = RaySession("somewhere:1", False, 2.0, 0.0)
    with pytest.raises(InputError, match=r"^workers.min: 3 is not allowed; the cluster at somewhere:1 has 2 cores"):
        share_of(config_of(min=3, max=4), session)
    with pytest.raises(InputError, match=r"^workers.min: 33 is not allowed; .* give at most 32$"):
        share_of(config_of(min=33, max=64, oversubscribe=True), session)
