"""Processes are found and ended by their mark, however they try to get away."""

import os
import subprocess
import sys
import time

import psutil

from coe_dist.orchestration.processes import end_marked, marked_processes, marking, new_mark

# A child that ignores SIGTERM, in a session of its own, whose parent is gone at once: init's child, nobody's group.
RUNAWAY = """
import subprocess, sys
stay = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", stay], start_new_session=True)
"""


def test_runaway_is_found_and_ended():
    mark = new_mark()
    with marking(mark):
        starter = subprocess.Popen([sys.executable, "-c", RUNAWAY], stdout=subprocess.PIPE, text=True)
    unmarked = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert starter.stdout.readline() == "ready\n"
        starter.wait()
        (runaway,) = marked_processes(mark)
        assert runaway.pid not in (starter.pid, unmarked.pid)
        assert runaway.pid not in [child.pid for child in psutil.Process().children(recursive=True)]
        begun = time.monotonic()
        assert end_marked(mark, grace_seconds=0.3) == [runaway.pid]
        assert time.monotonic() - begun < 30
        assert marked_processes(mark) == []
        assert unmarked.poll() is None
    finally:
        unmarked.kill()
        unmarked.wait()
        starter.stdout.close()


def test_marks_nest_and_the_environment_is_restored():
    before = dict(os.environ)
    outer, inner = new_mark(), new_mark()
    with marking(outer), marking(inner):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert dict(os.environ) == before
    try:
        deadline = time.monotonic() + 10
        while not marked_processes(outer) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [process.pid for process in marked_processes(outer)] == [child.pid]
        assert [process.pid for process in marked_processes(inner)] == [child.pid]
        assert marked_processes(new_mark()) == []
    finally:
        child.communicate(b"\n")


def test_nothing_to_end_returns_at_once():
    assert end_marked(new_mark()) == []
