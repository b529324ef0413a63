"""The router process as a Ray actor: same answers, no CPU of its own, and its end is told on every rank."""

import json
import re
from pathlib import Path

import pytest
from namespaces import scenario

SCENARIO = Path(__file__).with_name("scenario_router.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All runs of one session: Ray takes seconds to start, so they share one."""
    folder = tmp_path_factory.mktemp("router")
    told = scenario(SCENARIO, folder=folder)
    return {"told": told, **{name: [*map(read, sorted((folder / name).glob("rank-*.json")))] for name in told}}


def read(path):
    return json.loads(path.read_text())


def test_actor_answers_as_every_worker_would(found):
    assert found["told"]["agree"] is None
    assert len(found["agree"]) >= 2
    for rank in found["agree"]:
        assert rank["same"] == [True] * 4


def test_actor_is_a_process_of_its_own_and_ends_with_the_solver(found):
    workers = [rank["worker"] for rank in found["agree"]]
    first = found["agree"][0]
    assert first["router"] not in [None, *workers]
    assert first["router remains"] is False


def test_death_of_the_actor_is_told_on_every_rank_within_seconds(found):
    messages = {rank["message"] for rank in found["kill"]}
    assert len(found["kill"]) >= 2
    assert messages == {found["told"]["kill"]}
    assert re.match(r"router process \(pid \d+\) ended: .*[Ee]xit", found["told"]["kill"])
    assert all(rank["seconds"] < 75 for rank in found["kill"])  # half of what a silent router process is given


def test_a_request_that_fails_in_the_actor_is_told(found):
    assert re.match(
        r"router process \(pid \d+\) failed: ValueError: labels: 'no such rule' is not allowed", found["told"]["refuse"]
    )
