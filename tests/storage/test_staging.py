"""This machine's copies of .beton files: made once, verified, renewed, and removed in the order of their use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from namespaces import clean_environment
from small_data import write_small
from small_disk import small_disk

from coe_dist.config import parse_config
from coe_dist.data.sidecar import read_sidecar
from coe_dist.errors import InputError
from coe_dist.parallel.groups import create_groups
from coe_dist.storage import datasets, staging
from coe_dist.storage.datasets import beton_of, copied_beton, local_beton, sidecar_of
from coe_dist.storage.listing import listed
from coe_dist.training.job import Job
from coe_dist.training.staged import stage_together

READER = """
import sys
from coe_dist.config import parse_config
from coe_dist.storage.datasets import beton_of
data = parse_config({"name": "n", "data": {"folder": sys.argv[1], "staging": {"folder": sys.argv[2]}}}).data
print(beton_of(data, sys.argv[3]), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("written"))


@pytest.fixture
def source(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "source"))


def data_of(source: Path, staged: Path, **more: object):
    content = {"folder": f"file://{source}", "staging": {"folder": str(staged), **more}}
    return parse_config({"name": "n", "data": content}).data


def forget() -> None:
    """As if this process had ended: its copies are not in use any more."""
    datasets._here.clear()
    while staging._in_use:
        staging._in_use.popitem()[1].close()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    forget()


def reader(source: Path, staged: Path, split: str) -> subprocess.Popen[str]:
    """A process that reads a split until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, f"file://{source}", str(staged), split],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )


def test_four_processes_share_one_copy(source: Path, tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    processes = [reader(source, staged, "train") for _ in range(4)]
    answers = [process.communicate() for process in processes]
    assert {output for output, _ in answers} == {f"{copied_beton(data_of(source, staged), 'train')}\n"}, answers
    assert sum("copying" in errors for _, errors in answers) == 1, "one copied, the others waited"
    copy = Path(answers[0][0].strip())
    assert copy.read_bytes() == (source / "train.beton").read_bytes()
    assert read_sidecar(copy, verify=True) == read_sidecar(source / "train.beton")
    assert sorted(p.name for p in staged.iterdir()) == sorted([copy.parent.name, f"{copy.parent.name}.lock", "lock"])


def test_a_changed_file_is_refused_and_not_kept(source: Path, tmp_path: Path) -> None:
    content = bytearray((source / "train.beton").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "train.beton").write_bytes(content)
    data, expected = data_of(source, tmp_path / "staged"), sidecar_of(data_of(source, tmp_path / "s"), "train").sha256
    with pytest.raises(InputError, match=rf"train\.beton: its sha256 is [0-9a-f]{{64}}, {expected} in its side-car"):
        beton_of(data, "train")
    assert staging.copies(tmp_path / "staged") == []
    assert {path.suffix for path in (tmp_path / "staged").iterdir()} <= {".lock", ""}
    assert not [path for path in (tmp_path / "staged").iterdir() if path.is_dir()]


def test_a_shortened_or_missing_file_is_refused_before_it_is_copied(source: Path, tmp_path: Path) -> None:
    data = data_of(source, tmp_path / "staged")
    with (source / "train.beton").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"train\.beton: \d+ bytes, but \d+ in its side-car"):
        sidecar_of(data, "train")
    (source / "train.json").unlink()
    with pytest.raises(InputError, match=r"file://.*/train\.json: no such file in the store"):
        sidecar_of(data, "train")
    assert not (tmp_path / "staged").exists()


def test_a_source_that_was_written_anew_is_copied_anew(source: Path, tmp_path: Path) -> None:
    data = data_of(source, tmp_path / "staged")
    first = beton_of(data, "train")
    forget()
    assert beton_of(data, "train") == first
    forget()
    shutil.copy(source / "test.beton", source / "train.beton")
    info = json.loads((source / "test.json").read_text()) | {"split": "train"}
    (source / "train.json").write_text(json.dumps(info))
    second = beton_of(data, "train")
    assert second != first
    assert second.read_bytes() == (source / "test.beton").read_bytes()
    assert copied_beton(data, "train") == second


def test_what_was_not_used_longest_makes_room_but_never_what_is_read(source: Path, tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    sizes = {split: (source / f"{split}.beton").stat().st_size for split in ("train", "validation", "test")}
    two = (sizes["train"] + sizes["validation"] + sizes["test"] // 2) / 1e9
    data = data_of(source, staged, keep_gigabytes=two)
    process = reader(source, staged, "train")
    assert process.stdout is not None
    train = Path(process.stdout.readline().strip())
    validation = beton_of(data, "validation")
    forget()
    os.utime(train.parent.with_name(f"{train.parent.name}.lock"), (1, 1))  # the oldest, but in use
    test = beton_of(data, "test")
    assert train.is_file()
    assert not validation.exists()
    assert [copy.file for copy in staging.copies(staged) if copy.in_use] == [train, test]
    forget()
    removed = listed(staged, clean=True)
    assert [row["file"] for row in removed["removed"]] == [str(test)]
    assert [row["file"] for row in removed["copies"]] == [str(train)]
    process.communicate()
    assert [row["file"] for row in listed(staged, clean=True)["removed"]] == [str(train)]
    assert [path.name for path in staged.iterdir()] == ["lock"]


def test_what_an_interrupted_copy_left_is_removed(source: Path, tmp_path: Path) -> None:
    left = tmp_path / "staged" / ".partial-0"
    left.mkdir(parents=True)
    (left / "train.beton").write_bytes(b"half")
    beton_of(data_of(source, tmp_path / "staged"), "train")
    assert not left.exists()


def test_too_small_a_disk_is_told_before_a_byte_is_copied(source: Path, tmp_path: Path) -> None:
    needed = (source / "train.beton").stat().st_size
    with small_disk(tmp_path / "disk", "40k") as disk:
        with pytest.raises(
            InputError, match=rf"a copy of file://.*/train\.beton needs {needed:,} bytes, [\d,]+ are free"
        ):
            beton_of(data_of(source, disk / "staged"), "train")
        forget()


def test_a_path_is_copied_only_where_a_folder_is_given(source: Path, tmp_path: Path) -> None:
    plain = parse_config({"name": "n", "data": {"folder": str(source)}}).data
    assert beton_of(plain, "train") == source / "train.beton"
    shared = parse_config({"name": "n", "data": {"folder": str(source), "staging": {"folder": str(tmp_path / "s")}}})
    assert beton_of(shared.data, "train").is_relative_to(tmp_path / "s")


def test_a_file_by_its_url_comes_with_its_samples(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beton = local_beton(f"file://{source}/test.beton")
    assert beton.is_relative_to(tmp_path / "cache/coe_dist/staged")
    assert beton.with_suffix(".samples.tsv").read_bytes() == (source / "test.samples.tsv").read_bytes()
    with pytest.raises(InputError, match=r"give the address of a \.beton file"):
        local_beton(f"file://{source}")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data.folder", "s3://key:se/cret@bucket", "data.folder: s3://... is not allowed; an address has no password"),
        ("data.folder", "https://host/d?sig=1", "data.folder: https://... is not allowed"),
        ("storage.url", "runs", "storage.url: runs is not allowed; give an address"),
        ("storage.url", "sftp://me:word@host/x", "storage.url: sftp://... is not allowed"),
        ("runs_dir", "s3://bucket/runs", "runs_dir: s3://... is not allowed; give a folder here"),
    ],
)
def test_addresses_that_are_refused(field: str, value: str, said: str) -> None:
    section, _, key = field.partition(".")
    with pytest.raises(InputError) as refused:
        parse_config({"name": "n", section: {key: value} if key else value})
    assert str(refused.value).startswith(said)
    assert not any(secret in str(refused.value) for secret in ("cret", "me:word", "sig"))


def test_workers_learn_of_a_copy_that_failed(source: Path, tmp_path: Path) -> None:
    data = {"folder": f"file://{source}", "staging": {"folder": str(tmp_path / "staged")}}
    job = Job(task="train", config=parse_config({"name": "n", "data": data}), run_dir=str(tmp_path))
    groups = create_groups(4, timeout_seconds=300)
    stage_together(job, groups, torch.device("cpu"))
    assert [copy.file.name for copy in staging.copies(tmp_path / "staged") if copy.in_use] == [
        "train.beton",
        "validation.beton",
        "test.beton",
    ]
    forget()
    staging.clean(tmp_path / "staged")
    (source / "validation.beton").write_bytes(bytes((source / "validation.beton").stat().st_size))
    with pytest.raises(InputError, match=r"validation\.beton: its sha256 is"):
        stage_together(job, groups, torch.device("cpu"))
