"""Ctrl-C and SIGTERM end the run and every process that belongs to it."""

import os
import secrets
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from namespaces import clean_environment, private_network_command, python
from waiting import until

SCENARIO = Path(__file__).with_name("scenario_interrupted.py")


def left_behind(mark):
    """Living processes whose environment carries the mark, whatever their name, parent or group."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark:
                found.append((process.pid, process.name()))
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("number", "whole_group", "raised", "code"),
    [
        pytest.param(signal.SIGINT, True, "KeyboardInterrupt", -signal.SIGINT, id="ctrl-c in a terminal"),
        pytest.param(signal.SIGTERM, False, "Terminated", 143, id="sigterm"),
    ],
)
def test_no_process_is_left_behind(tmp_path, number, whole_group, raised, code):
    run_dir, temporary, mark = tmp_path / "run", tmp_path / "t", secrets.token_hex(8)
    run_dir.mkdir()
    short = Path("/tmp") / f"t{mark[:6]}"  # the temporary folder must be short for Ray's sockets
    short.mkdir()
    environment = clean_environment(TEST_MARK=mark, TMPDIR=str(short), XDG_STATE_HOME=str(temporary))
    process = subprocess.Popen(
        private_network_command(python(SCENARIO, str(run_dir))),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: len(list(run_dir.glob("started-*"))) >= 2, "the workers' start", process=process)
        assert len(left_behind(mark)) > 5  # the search sees Ray's processes while they live
        (os.killpg if whole_group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=60)
        assert output.splitlines()[-1] == raised
        assert process.returncode == code
        assert left_behind(mark) == []
        assert list(short.glob("coe-*")) == []
        short.rmdir()
    finally:
        for pid, _ in left_behind(mark):
            os.kill(pid, signal.SIGKILL)
