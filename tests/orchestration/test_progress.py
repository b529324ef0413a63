"""Following metrics.jsonl: whole lines only, only new ones, shown live or one line an epoch."""

import io
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from coe_dist.orchestration.progress import ProgressDisplay, render
from coe_dist.orchestration.progress_state import ProgressState
from coe_dist.orchestration.tail import FileTail

START = {"kind": "start", "time": 100.0, "task": "train", "epochs": 3, "steps_per_epoch": 10, "world_size": 2,
         "experts": 2, "experts_per_sample": 2, "images": 80, "step": 0}  # fmt: skip
START_ON_ONE = START | {"world_size": 1}
RESUMED = START | {"step": 10, "resumed_from": "step-00000010"}
END = {"kind": "end", "time": 190.0, "step": 30, "seconds": 90.4}


def train(step, **metrics):
    values = {"train/loss": 2.0 - step / 100, "train/loss_experts": 1.0, "train/images_per_second": 1234.5,
              "expert/00/load": 0.25, "expert/01/load": 0.75} | metrics  # fmt: skip
    return {"kind": "train", "time": 100.0 + 3 * step, "step": step, "epoch": (step - 1) // 10, "metrics": values}


def evaluation(step):
    metrics = {"val/top1": 0.8341, "val/top1_delegator": 0.7, "val/exit_rate": 0.25, "val/average_macs": 190_000.0}
    return {"kind": "evaluation", "time": 100.0 + 3 * step, "step": step, "epoch": (step - 1) // 10,
            "split": "validation", "metrics": metrics}  # fmt: skip


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@given(
    st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=8), max_size=6),
    st.binary(max_size=5).filter(lambda rest: b"\n" not in rest),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_any_way_of_writing_gives_the_same_lines(tmp_path_factory, texts, torn, cuts):
    content = "".join(f"{text}\n" for text in texts).encode() + torn
    path = tmp_path_factory.mktemp("tail") / "file"
    tail, read, begun = FileTail(path), [], 0
    for cut in [*sorted(cuts), len(content)]:
        with path.open("ab") as file:
            file.write(content[begun:cut])
        begun = max(begun, cut)
        read += tail.new_lines()
    assert read == texts


def test_tail_ignores_the_past_and_survives_a_new_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old\n")
    tail = FileTail(path)
    assert tail.new_lines() == []
    with path.open("a") as file:
        file.write("new\nha")
    assert tail.new_lines() == ["new"]
    path.write_text("a\n")
    assert tail.new_lines() == ["a"]
    path.unlink()
    assert tail.new_lines() == []


def shown(tmp_path, writes, *, terminal):
    """What the display prints while the pieces of text are written one after the other."""
    output, path = io.StringIO(), tmp_path / "metrics.jsonl"
    display = ProgressDisplay(tmp_path, Console(file=output, force_terminal=terminal, width=100, color_system=None))
    display.start()
    for text in writes:
        with path.open("a") as file:
            file.write(text)
        time.sleep(0.35)
    display.stop()
    display.stop()
    return output.getvalue()


def test_one_line_an_epoch_where_there_is_no_terminal(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(START, *(train(step) for step in (5, 10)), evaluation(10)))
    second = lines(train(25), train(30), evaluation(30), END)
    text = shown(
        tmp_path,
        [lines(RESUMED, train(15), train(20), evaluation(20)) + second[:20], second[20:]],
        terminal=False,
    )
    assert text.splitlines() == [
        "resuming from step-00000010 at step 10 of 30 on 2 workers",
        "epoch 2/3, loss 1.8000, validation top-1 83.41%, 1,234 images/s, expert loads 25.00% to 75.00%, 0:00:30 left",
        "epoch 3/3, loss 1.7000, validation top-1 83.41%, 1,234 images/s, expert loads 25.00% to 75.00%, 0:00:00 left",
        "trained 20 steps in 0:01:30",
    ]


@pytest.mark.parametrize(
    ("start", "line"),
    [
        (START_ON_ONE, "training starts at step 0 of 30 on 1 worker"),
        (START_ON_ONE | {"epochs": 0}, "training.epochs is 0: the networks answer as they start"),
        (RESUMED, "resuming from step-00000010 at step 10 of 30 on 2 workers"),
        (
            RESUMED | {"step": 30, "resumed_from": "step-00000030"},
            "nothing is left to train: step-00000030 is of step 30 of 30",
        ),
    ],
)
def test_where_it_starts_is_said(tmp_path, start, line):
    assert line in shown(tmp_path, [lines(start)], terminal=False).splitlines()
    (tmp_path / "metrics.jsonl").unlink()
    live = shown(tmp_path, [lines(start)], terminal=True)
    assert (line in live) == ("resumed_from" in start)


def test_a_start_with_nothing_left_trains_nothing(tmp_path):
    resumed = RESUMED | {"step": 30, "resumed_from": "step-00000030"}
    text = shown(tmp_path, [lines(resumed, END | {"seconds": 1.0})], terminal=False)
    assert "trained" not in text


def test_seconds_are_those_of_all_starts():
    state = ProgressState()
    cut_short = lines(START, train(5), train(10))  # from 100 to 130 seconds, unless START says otherwise
    for line in (cut_short + lines(RESUMED | {"time": 1000.0}, END | {"time": 1090.4})).splitlines():
        state.read(line)
    assert state.seconds == pytest.approx(130.0 - START["time"] + 90.4)
    again = RESUMED | {"time": 2000.0, "step": 30, "resumed_from": "step-00000030"}
    for line in lines(again, END | {"time": 2001.0, "seconds": 1.0}).splitlines():
        state.read(line)
    assert state.seconds == pytest.approx(130.0 - START["time"] + 91.4)


def test_epochs_without_an_evaluation_have_their_line_too(tmp_path):
    text = shown(tmp_path, [lines(START, train(5), train(10), train(15), train(20), train(30), END)], terminal=False)
    assert [line.split(",")[0] for line in text.splitlines()[1:-1]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "loss 1.9000" in text.splitlines()[1]


def test_no_epochs_end_too(tmp_path):
    text = shown(tmp_path, [lines(START | {"epochs": 0}, END | {"step": 0, "seconds": 2.0})], terminal=False)
    assert text.splitlines()[-1] == "trained 0 steps in 0:00:02"


def test_live_display_shows_the_newest_figures(tmp_path):
    text = shown(tmp_path, [lines(START, train(5)), lines(train(15), evaluation(15))], terminal=True)
    for figure in (
        "workers are starting",
        "epoch 2/3",
        "step 15/30",
        "1,234 images/s",
        "0:00:45 left",
        "loss 1.850 (experts 1.000)",
        "validation top-1 83.41%",
        "early exits 25.00%",
        "190,000 MACs",
        "expert loads |▃█| 25.00% to 75.00%",
    ):
        assert figure in text
    assert text.index("step 5/30") < text.index("step 15/30")


@pytest.mark.parametrize("line", ["", "{", "[]", "3", '{"kind": "train"}', '{"kind": 5}', '{"kind": "unheard of"}',
                                  '{"kind": "train", "step": "x", "epoch": 0, "time": 1, "metrics": {}}'])  # fmt: skip
def test_lines_that_say_nothing_change_nothing(line):
    state = ProgressState()
    state.read(json.dumps(START))
    before = state.total_steps, state.step
    assert state.read(line) is None
    assert (state.total_steps, state.step) == before
    Console(file=io.StringIO()).print(render(state))


def test_values_that_are_not_finite_are_shown():
    state = ProgressState()
    for record in (START, train(5, **{"train/loss": math.nan, "expert/00/load": math.nan}), evaluation(5)):
        assert state.read(json.dumps(record)) is not None
    output = io.StringIO()
    Console(file=output, width=100).print(render(state))
    assert "loss nan" in output.getvalue()


def test_single_network_has_no_loads():
    state = ProgressState()
    state.read(json.dumps(START))
    state.read(json.dumps({"kind": "train", "time": 1.0, "step": 1, "epoch": 0, "metrics": {"train/loss": 1.0}}))
    assert state.loads == []
    output = io.StringIO()
    Console(file=output, width=100).print(render(state))
    assert "expert" not in output.getvalue()


def test_many_experts_are_in_the_order_of_their_ids():
    state = ProgressState()
    state.read(json.dumps(START))
    loads = {f"expert/{expert:02d}/load": expert / 7140 for expert in range(120)}
    state.read(json.dumps(train(1) | {"metrics": loads}))
    assert state.loads == [expert / 7140 for expert in range(120)]
