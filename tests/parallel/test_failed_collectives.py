"""What a failed collective says: who, where, what, and the library's reason without its builder's paths and guesses."""

import pytest

from coe_dist.errors import TrainingError
from coe_dist.parallel.groups import Group

GLOO = (
    "[/builds/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:9604: Connection reset "
    "by peer. This is typically caused by a remote worker hanging or bugs in the application."
)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (GLOO, "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:9604: Connection reset by peer."),
        ("Timed out\nmore", "Timed out"),
        ("", "RuntimeError"),
    ],
)
def test_a_failed_collective_names_rank_group_and_reason_in_one_line(raised: str, told: str) -> None:
    with pytest.raises(TrainingError) as caught, Group("expert 3", (0, 2), None).naming_failures("all-reduce"):
        raise RuntimeError(raised)
    assert str(caught.value) == f"rank 0, group 'expert 3' (ranks [0, 2]): all-reduce failed: {told}"
