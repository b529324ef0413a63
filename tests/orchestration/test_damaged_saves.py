"""The real command on a disk that fills up, and on saves cut short or changed: it goes on from a whole one."""

import json
import threading

import pytest
from small_data import small_config, write_config, write_small
from small_disk import fill, small_disk
from train_command import Command

from coe_dist.training.checkpoint import complete_saves, damage

STEPS = 4  # of an epoch


class Filling(threading.Thread):
    """Leaves no room on the disk of `file`, whatever is removed from it."""

    def __init__(self, file):
        super().__init__(daemon=True)
        self.file, self.ended = file, threading.Event()

    def run(self):
        while not self.ended.wait(0.001):
            fill(self.file)

    def stop(self):
        self.ended.set()
        self.join()
        self.file.unlink()


def cut_short(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def one_byte_changed(file):
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


@pytest.fixture
def job(tmp_path):
    """Configuration and run folder of a training that saves after each step; the run folder is on a small disk."""
    with small_disk(tmp_path / "small-disk", "6m") as place:
        content = small_config(
            write_small(tmp_path / "data"),
            place,
            training={"epochs": 100_000, "checkpoint_every_steps": 1, "evaluate_every": 100_000},
            workers={"oversubscribe": True},
            tracking={"enabled": False, "every_steps": 1},
        )
        yield write_config(tmp_path / "config.yaml", content), place / "run"


def test_a_full_disk_and_damaged_files_cost_the_last_save_only(job):
    config, run = job
    command, filling = Command(config, run), Filling(run.parent / "ballast")
    try:
        command.started(1)
        command.until(lambda: len(complete_saves(run / "checkpoints")) == 2, "second save")
        filling.start()
        code, _, errors = command.end()
    finally:
        command.close()
        filling.stop()
    assert code == 1
    assert "No space left on device" in errors.splitlines()[-1]
    assert "earlier ones are still valid" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    step = step_of(run)

    for harm in (cut_short, one_byte_changed):
        last, before, *_ = complete_saves(run / "checkpoints")
        assert (damage(last), damage(before)) == ("", "")
        harm(next(last.glob("expert-0001.safetensors")))
        epoch = step // STEPS + 1
        again = Command(config, run, f"training.epochs={epoch}", "training.evaluate_every=1")
        try:
            code, output, errors = again.end()
        finally:
            again.close()
        assert code == 0, errors
        (warning,) = [line for line in errors.splitlines() if "is damaged" in line]
        assert last.name in warning
        assert "expert-0001.safetensors" in warning
        assert warning.endswith("falling back to the checkpoint before it")
        assert f"resuming from {before.name}" in output
        assert again.records("start")[-1]["step"] == int(before.name.removeprefix("step-"))
        step = step_of(run)
        assert step == epoch * STEPS

    before_refusals = sorted(run.rglob("*"))
    for field, value, line in (
        ("format", 2, "checkpoint format 2 is not allowed; this version reads format 1"),
        ("classes", ["cat", "dog"], "its classes are cat, dog, those of the data T-shirt/top, Trouser, Pullover, "),
    ):
        code, _, errors = refused(config, run, field, value)
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert f"{complete_saves(run / 'checkpoints')[0]}: {line}" in errors
        assert sorted(run.rglob("*")) == before_refusals


def refused(config, run, field, value):
    """How the command ends while the newest manifest has another `value` in `field`."""
    manifest = complete_saves(run / "checkpoints")[0] / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(content), field: value}))
    command = Command(config, run)
    try:
        return command.end()
    finally:
        command.close()
        manifest.write_text(content)


def step_of(run):
    """The step of the newest complete save."""
    return int(complete_saves(run / "checkpoints")[0].name.removeprefix("step-"))
