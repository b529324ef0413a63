"""Which of several workers' failures is told."""

import itertools
import pickle

import pytest

from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.failures import WorkerFailed, describe_failure, root_cause, write_account


def failed(rank, kind="other", when=0.0, message="RuntimeError: connection closed"):
    return WorkerFailed(rank, kind, message, f"Traceback of rank {rank}\n", when)


def described(error, rank=3):
    try:
        raise error
    except type(error) as raised:
        return describe_failure(raised, rank)


def test_failures_survive_pickling():
    failure = described(ValueError("first line\nsecond"))
    copy = pickle.loads(pickle.dumps(failure))
    assert (copy.rank, copy.kind, copy.message, copy.when) == (3, "other", "ValueError: first line", failure.when)
    assert "test_failures.py" in copy.account
    assert str(copy) == "rank 3: ValueError: first line"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("data.folder: x"), "input", "data.folder: x"),
        (TrainingError("step 3: no"), "training", "step 3: no"),
        (RuntimeError(""), "other", "RuntimeError: RuntimeError"),
    ],
)
def test_kinds(error, kind, message):
    failure = described(error)
    assert (failure.kind, failure.message) == (kind, message)


def test_earliest_failure_is_the_cause_in_any_order():
    failures = [failed(0, when=2.0), failed(1, "training", 1.0, "step 9: the loss is not finite"), failed(2, when=3.0)]
    for order in itertools.permutations(failures):
        error = root_cause({failure.rank: failure for failure in order})
        assert type(error) is TrainingError
        assert str(error) == "step 9: the loss is not finite"


def test_bad_input_comes_first_and_a_death_before_its_consequences():
    death = RuntimeError("The actor died unexpectedly.\nmore")
    error = root_cause({0: failed(0, when=1.0), 1: death})
    assert str(error) == "the process of rank 1 ended unexpectedly: The actor died unexpectedly."
    error = root_cause({0: failed(0, when=1.0), 1: death, 2: failed(2, "input", 9.0, "name: x is not allowed")})
    assert type(error) is InputError
    assert str(error) == "name: x is not allowed"


def test_killed_for_memory_is_told_as_such():
    report = "The actor died.\nTask was killed due to the node running low on memory.\nrest"
    assert str(root_cause({0: RuntimeError(report)})).endswith("killed due to the node running low on memory.")


def test_failure_ray_cannot_assign():
    assert str(root_cause({-1: RuntimeError("gone")})) == "a worker's process ended unexpectedly: gone"


def test_account_holds_every_rank_earliest_first(tmp_path):
    path = write_account(tmp_path, {0: failed(0, when=2.0), 1: failed(1, when=1.0)})
    text = path.read_text()
    assert path == tmp_path / "error.txt"
    assert text.index("==== rank 1 ====\nTraceback of rank 1") < text.index("==== rank 0 ====\nTraceback of rank 0")
