"""The copy of a run in a store: complete in the end whatever the store does meanwhile, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, Server, s3_server, using
from stored_run import content, record, save, stored_run, unsave

from coe_dist.config import parse_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.mirroring import mirrored, pull_run, push_run, restore
from coe_dist.storage import download
from coe_dist.storage import mirror as mirror_module
from coe_dist.storage.mirror import Mirror
from coe_dist.storage.pulling import local_run, pull
from coe_dist.storage.remote import Remote


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as server, using(server.environment):
        yield server


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(mirror_module, "_LONGEST_WAIT", 0.3)


def until(found, what: str) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.02)


def copy_of(server: Server, prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(prefix): server.content(name) for name in server.names(prefix)}


@pytest.mark.usefixtures("_often")
def test_nothing_is_lost_by_a_server_that_dies_and_forgets(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stored_run(tmp_path)
    url = f"s3://{BUCKET}/killed/demo"
    mirror = Mirror(run, Remote(url))
    mirror.start()
    save(run, 1, best=True)
    until(lambda: "killed/demo/checkpoints/latest" in server.names("killed/"), "save")
    server.end()
    record(run, "while it was gone")
    save(run, 2)
    save(run, 3)
    unsave(run, 2)
    until(lambda: "does not take the run" in caplog.text, "warning")
    server.start()
    record(run, "after that")
    until(lambda: "takes the run again" in caplog.text, "second warning")
    save(run, 4)
    mirror.finish()
    assert copy_of(server, "killed/demo/") == content(run)
    assert len([line for line in caplog.messages if "does not take the run" in line]) == 1
    assert not any("did not reach" in line for line in caplog.messages)
    assert not (run / ".sending").exists()


@pytest.mark.usefixtures("_often")
def test_what_is_missing_in_the_end_is_named_and_can_be_pushed(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ATTEMPTS", 1)
    monkeypatch.setattr(mirror_module, "_LAST_ATTEMPTS", 2)
    run = stored_run(tmp_path, url=f"s3://{BUCKET}/pushed")
    server.end()
    mirror = Mirror(run, Remote(f"s3://{BUCKET}/pushed/demo"))
    mirror.start()
    save(run, 5)
    mirror.finish()
    (line,) = [message for message in caplog.messages if "did not reach" in message]
    assert f"checkpoints/step-00000005, config.yaml, logs/rank-0000.log and 1 more of {run} did not reach" in line
    assert line.endswith(f"`coe-dist storage push {run}` sends what is missing")
    assert not any(secret in caplog.text for secret in ("sesame", "someone"))
    with pytest.raises(TrainingError, match="pushed/demo does not take"):
        push_run(run, None)
    server.start()
    assert push_run(run, None) == f"s3://{BUCKET}/pushed/demo"
    assert copy_of(server, "pushed/demo/") == content(run)


def test_training_never_waits_for_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """It takes connections and says nothing: the end comes all the same, and names what is missing."""
    import socket

    monkeypatch.setattr(mirror_module, "_STALLED_SECONDS", 1.0)
    run = stored_run(tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with using({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": address}):
            mirror = Mirror(run, Remote(f"s3://{BUCKET}/hung/demo"))
            mirror.start()
            mirror.finish()
    assert "did not reach" in caplog.text


def test_saves_are_sent_once_and_removed_after_a_newer_one_is_complete(tmp_path: Path) -> None:
    run, store = stored_run(tmp_path), tmp_path / "store"
    remote = Remote(f"file://{store}")
    sent: list[str] = []
    send = remote.send
    remote.send = lambda file, name, moved: (sent.append(name), send(file, name, moved))
    save(run, 1)
    Mirror(run, remote).push()
    (store / "checkpoints/step-00000001/stranger").write_text("left by a crash")
    mirror = Mirror(run, remote)
    mirror.push()
    assert (store / "checkpoints/step-00000001/stranger").is_file()
    save(run, 2)
    unsave(run, 1)
    mirror.push()
    mirror.push()
    assert len(sent) == len(set(sent)) == 4
    assert content(store) == content(run)
    unsave(run, 2)  # damaged, say: the only one there is stays
    mirror.push()
    assert (store / "checkpoints/step-00000002/manifest.json").is_file()
    save(run, 2, size=7)  # made anew, with another content
    mirror.push()
    assert content(store) == content(run)


def test_a_save_that_is_removed_while_it_is_sent_arrives_whole(tmp_path: Path) -> None:
    run, store = stored_run(tmp_path), tmp_path / "store"
    mirror = Mirror(run, Remote(f"file://{store}"))
    send = mirror.remote.send

    def slowly(file, name, moved):
        send(file, name, moved)
        if (run / "checkpoints/step-00000001").exists():
            unsave(run, 1)

    mirror.remote.send = slowly
    expected = content(save(run, 1))
    mirror.push()
    assert content(store / "checkpoints/step-00000001") == expected


def test_another_run_and_a_newer_one_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, store = stored_run(tmp_path / "ours"), tmp_path / "store/demo"
    save(ours, 1)
    push_run(ours, f"file://{store}")
    other = stored_run(tmp_path / "other", url=f"file://{tmp_path / 'store'}")
    before = content(store)
    with pytest.raises(InputError, match="holds another run of this name"):
        push_run(other, None)
    config = parse_config({"name": "demo", "runs_dir": str(other.parent), "storage": {"url": f"file://{store.parent}"}})
    with pytest.raises(InputError, match="holds another run of this name"), mirrored(config, overwrite=False):
        pass
    shutil.copytree(ours, tmp_path / "stale/demo")
    save(ours, 2)
    push_run(ours, f"file://{store}")
    with pytest.raises(InputError, match=r"holds step-00000002, .*demo only step-00000001; `coe-dist storage pull"):
        push_run(tmp_path / "stale/demo", f"file://{store}")
    assert content(store).keys() > before.keys()
    with mirrored(config, overwrite=True) as mirror:
        mirror.start()
    assert content(store) == content(other)
    (tmp_path / "store/mine").mkdir()
    (tmp_path / "store/mine/letter").write_text("dear")
    with pytest.raises(InputError, match="holds files, but no run"):
        push_run(ours, f"file://{tmp_path}/store/mine")


def test_a_run_goes_on_elsewhere(tmp_path: Path) -> None:
    ours, store = stored_run(tmp_path / "a"), tmp_path / "store/demo"
    for step in (1, 2, 3):
        save(ours, step, best=step == 1)
    push_run(ours, f"file://{store}")
    config = parse_config(
        {"name": "demo", "runs_dir": str(tmp_path / "b"), "storage": {"url": f"file://{tmp_path}/store"}}
    )
    restore(config)
    pulled = content(config.run_dir)
    assert pulled == {name: text for name, text in content(ours).items() if "step-00000002" not in name}
    restore(config)
    with pytest.raises(InputError, match="exists; give another place, or --overwrite"):
        pull_run(f"file://{store}", config.run_dir, overwrite=False)
    save(config.run_dir, 4)
    push_run(config.run_dir, None if config.storage.url is None else f"{config.storage.url}/demo")
    assert pull_run(f"file://{store}", ours, overwrite=True) == ours
    assert content(ours)["checkpoints/latest"] == b"step-00000004"


def test_a_damaged_copy_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, store = stored_run(tmp_path / "a"), tmp_path / "store"
    for step in (1, 2):
        save(ours, step)
    push_run(ours, f"file://{store}")
    file = store / "checkpoints/step-00000002/delegator.safetensors"
    file.write_bytes(file.read_bytes()[::-1])
    run = pull_run(f"file://{store}", tmp_path / "b", overwrite=False)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert (run / "checkpoints/latest").read_text() == "step-00000001"
    assert "step-00000002 is damaged (delegator.safetensors does not match its sha256); falling back" in caplog.text
    (store / "checkpoints/step-00000001/expert-0000.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no valid checkpoint \(expert-0000.safetensors is missing\)"):
        pull_run(f"file://{store}", tmp_path / "c", overwrite=False)
    assert not (tmp_path / "c").exists()


def test_hostile_names_lead_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    digest = "0" * 64
    files = {
        "config.yaml": b"name: demo\n",
        "../escaped.txt": b"!",
        "logs/../../escaped.txt": b"!",
        ".hidden": b"!",
        "checkpoints/step-00000001/manifest.json": json.dumps({"files": {"../../../escaped.txt": digest}}).encode(),
        "checkpoints/step-00000001/../../../escaped.txt": b"!",
        "checkpoints/step-../manifest.json": b"{}",
    }
    for name, text in files.items():
        memory.store[f"/hostile/demo/{name}"] = memory._open(f"/made/{len(name)}", "wb")
        memory.store[f"/hostile/demo/{name}"].write(text)
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"no valid checkpoint \(manifest.json names '../../../escaped.txt'\)"):
        pull(Remote("memory://hostile/demo"), tmp_path / "in/demo", "latest")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        "in/demo/config.yaml",
        "in/demo/.pulled.json",
    }
    assert "not those of a run; left out" in caplog.text


def test_a_run_by_its_address_is_read_from_a_copy_that_follows(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours, url = stored_run(tmp_path / "a"), f"s3://{BUCKET}/read/demo"
    for step in (1, 2):
        save(ours, step)
    push_run(ours, url)
    folder = local_run(url)
    assert folder.name == "demo"
    assert folder.is_relative_to(tmp_path / "cache/coe_dist/runs")
    assert content(folder) == {name: text for name, text in content(ours).items() if "checkpoints" not in name}
    (folder / "model-card.md").write_text("ours")
    os.utime(folder / "config.yaml", (1, 1))
    record(ours, "more")
    save(ours, 3)
    unsave(ours, 1)
    push_run(ours, url)
    assert local_run(url, "latest", "2") == folder
    assert content(folder) == {**content(ours), "model-card.md": b"ours", "checkpoints/latest": b"step-00000003"}
    assert (folder / "config.yaml").stat().st_mtime == 1, "it was not asked for again"
    with pytest.raises(InputError, match=r"--checkpoint: 1 is not allowed; .*/demo holds the steps 2, 3"):
        local_run(url, "1")
    with pytest.raises(InputError, match="it is not a run folder"):
        local_run(f"s3://{BUCKET}/read")
    with pytest.raises(InputError, match="no-such-bucket/demo cannot be read; The specified bucket does not exist"):
        local_run("s3://no-such-bucket/demo")
    assert local_run(str(ours)) == ours


def test_addresses_with_a_password_or_without_a_library_are_refused() -> None:
    with pytest.raises(InputError) as refused:
        Remote("s3://key:secret@bucket/run")
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match=r"gs://bucket/run is not allowed; .* pip install -e '\.\[gs\]' in the "):
        Remote("gs://bucket/run")
