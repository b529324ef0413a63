"""Usable cores and memory from made-up cgroup trees."""

import os

import psutil
import pytest

from coe_dist.resources import usable_cores, usable_memory


def tree(tmp_path, own, **files):
    """A cgroup mount with `files` ("a__b" is a/b) and this process's line in /proc/self/cgroup."""
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    line = tmp_path / "self"
    line.write_text(own)
    return root, line


def renamed(root, **names):
    for old, new in names.items():
        for path in root.rglob(old):
            path.rename(path.with_name(new))


@pytest.fixture
def affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


@pytest.mark.parametrize(
    ("leaf", "top", "cores"),
    [
        ("max 100000", "max 100000", 16),
        ("400000 100000", "max 100000", 4),
        ("max 100000", "250000 100000", 2),
        ("800000 100000", "300000 100000", 3),
        ("50000 100000", "max 100000", 1),
        ("3200000 100000", "max 100000", 16),
        ("rubbish", "max 100000", 16),
    ],
)
def test_quota_of_any_level_counts_v2(tmp_path, affinity, leaf, top, cores):
    root, line = tree(tmp_path, "0::/a/b\n", a__b__cpu=leaf, a__cpu=top)
    renamed(root, cpu="cpu.max")
    assert usable_cores(root, line) == cores


def test_path_of_the_host_inside_a_container(tmp_path, affinity):
    root, line = tree(tmp_path, "0::/not/here\n", cpu="200000 100000")
    renamed(root, cpu="cpu.max")
    assert usable_cores(root, line) == 2


def test_version_1(tmp_path, affinity):
    root, line = tree(
        tmp_path, "4:cpu,cpuacct:/job\n7:memory:/job\n", cpu__job__quota="600000", cpu__job__period="200000",
        memory__job__limit="123456",
    )  # fmt: skip
    renamed(root, quota="cpu.cfs_quota_us", period="cpu.cfs_period_us", limit="memory.limit_in_bytes")
    assert usable_cores(root, line) == 3
    assert usable_memory(root, line) == 123456


def test_unlimited_version_1(tmp_path, affinity):
    root, line = tree(tmp_path, "4:cpu:/job\n", cpu__job__quota="-1", cpu__job__period="100000")
    renamed(root, quota="cpu.cfs_quota_us", period="cpu.cfs_period_us")
    assert usable_cores(root, line) == 16


def test_memory_limit_above_the_machines_counts_for_nothing(tmp_path):
    root, line = tree(tmp_path, "0::/a\n", a__memory=str(2**60), memory="1000000")
    renamed(root, memory="memory.max")
    assert usable_memory(root, line) == 1_000_000
    assert usable_memory(tmp_path / "none", line) == psutil.virtual_memory().total


def test_this_machine_has_what_it_lets_us_run_on():
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    assert 0 < usable_memory() <= psutil.virtual_memory().total
