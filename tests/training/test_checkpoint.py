"""Checkpoints: every network by its global id, on any world size and engine; torn and foreign ones are not taken."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from parallel.parity_cases import build_step
from ranks import run_ranks
from reference import Case
from small_disk import small_disk
from training import checkpoint_cases
from training.checkpoint_cases import digests, engines_of, save, train

from coe_dist.errors import InputError, TrainingError
from coe_dist.parallel.groups import create_groups
from coe_dist.parallel.placement import ExpertPlacement
from coe_dist.training import checkpoint, saving
from coe_dist.training.checkpoint import Position
from coe_dist.training.ownership import Owner
from coe_dist.training.step import CollaborationStep


def test_training_goes_on_from_four_ranks_to_two_to_one_to_three(tmp_path: Path) -> None:
    """Weights, statistics and momentum are those that were saved, and the end is that of uninterrupted training."""
    cases = checkpoint_cases.cases()
    for index, case in enumerate(cases):
        torch.save(reference.train(case), tmp_path / f"{index}.pt")
    for ranks in checkpoint_cases.WORLDS:
        run_ranks(ranks, "training.checkpoint_cases:run", tmp_path)
    for index, case in enumerate(cases):
        networks = {"delegator", *(f"expert {expert}" for expert in range(case.experts))}
        for done, (before, after) in zip((2, 4, 6), pairwise(checkpoint_cases.WORLDS), strict=True):
            saved = held(tmp_path, f"{index}-saved-{done}", before, case)
            loaded = held(tmp_path, f"{index}-loaded-{done}", after, case)
            assert set(saved) == set(loaded) == networks
            for network in networks:
                assert any(name.endswith("momentum_buffer") for name in saved[network])
                assert saved[network] == loaded[network], f"{network} in {case.name}"
            distinct = {json.dumps(saved[network]) for network in networks}
            assert len(distinct) == len(networks), "experts must differ"
        newest = tmp_path / str(index) / "step-00000008"
        assert sorted(path.name for path in newest.iterdir()) == expected_files(case.experts)
        times = {path.name: path.stat().st_mtime_ns for path in newest.iterdir()}
        assert max(times, key=lambda name: times[name]) == "manifest.json"
    for rank in range(3):
        results = json.loads((tmp_path / f"errors-{rank}.json").read_text())
        assert len(results) == len(cases)
        assert not [(case, error) for case, error in results if not error[0] <= 1e-5]


def held(folder: Path, name: str, ranks: int, case: Case) -> dict[str, dict[str, str]]:
    """Hashes by network over all ranks, which must agree where they hold the same one."""
    result: dict[str, dict[str, str]] = {}
    for rank in range(ranks):
        mine = json.loads((folder / f"{name}-rank{rank}.json").read_text())
        hosted = ExpertPlacement(case.experts, ranks).experts_of_rank[rank]
        assert set(mine) == {"delegator", *(f"expert {expert}" for expert in hosted)}
        for network, hashes in mine.items():
            assert result.setdefault(network, hashes) == hashes, f"{network} differs between ranks"
    return result


def expected_files(experts: int) -> list[str]:
    stems = ["delegator", *(f"expert-{expert:04d}" for expert in range(experts))]
    return sorted([f"{stem}.{end}" for stem in stems for end in ("safetensors", "optim.pt")] + ["manifest.json"])


CASE = Case(1, 3, 2, steps=4)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[CollaborationStep, Path]:
    """Three saves of three experts, after 1, 2 and 3 steps."""
    groups = create_groups(CASE.experts, timeout_seconds=300)
    step = build_step(CASE, groups, None)
    for done in (1, 2, 3):
        train(CASE, groups, step, done - 1, done)
        save(tmp_path, step, groups, Position(done, 0, done, done), keep=3)
    return step, tmp_path


def tear(kind: str, save_folder: Path) -> None:
    victim = save_folder / "expert-0001.safetensors"
    manifest = save_folder / "manifest.json"
    if kind == "truncated":
        os.truncate(victim, victim.stat().st_size - 1)
    elif kind == "emptied":
        os.truncate(save_folder / "delegator.optim.pt", 0)
    elif kind == "flipped":
        content = bytearray(victim.read_bytes())
        content[-5] ^= 1
        victim.write_bytes(content)
    elif kind == "lost":
        victim.unlink()
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "torn manifest":
        os.truncate(manifest, manifest.stat().st_size // 2)
    elif kind == "empty manifest":
        manifest.write_text('{"format": 1}')
    elif kind == "other manifest":
        manifest.write_text("[]")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("truncated", "expert-0001.safetensors does not match its sha256"),
        ("emptied", "delegator.optim.pt does not match its sha256"),
        ("flipped", "expert-0001.safetensors does not match its sha256"),
        ("lost", "expert-0001.safetensors is missing"),
        ("no manifest", "manifest.json is missing"),
        ("torn manifest", "manifest.json: "),
        ("empty manifest", "manifest.json: incomplete"),
        ("other manifest", "manifest.json: not a mapping"),
    ],
)
def test_a_torn_save_falls_back_to_the_one_before(
    kind: str, told: str, trained: tuple[CollaborationStep, Path]
) -> None:
    _, folder = trained
    groups = create_groups(CASE.experts, timeout_seconds=300)
    tear(kind, folder / "step-00000003")
    newest, warnings = checkpoint.agreed_save(folder, groups)
    assert newest == folder / "step-00000002"
    assert len(warnings) == 1
    assert "step-00000003 is damaged" in warnings[0]
    assert told in warnings[0]
    assert "falling back to the checkpoint before it" in warnings[0]
    # training goes back behind the torn save and writes it anew
    step = build_step(CASE, groups, None)
    position, _ = checkpoint.load(newest, engines_of(step), experts=CASE.experts)
    assert position == Position(2, 0, 2, 2)
    train(CASE, groups, step, 2, 3)
    save(folder, step, groups, Position(3, 0, 3, 3), keep=3)
    assert checkpoint.agreed_save(folder, groups) == (folder / "step-00000003", [])
    tear(kind, folder / "step-00000003")
    tear(kind, folder / "step-00000002")
    tear(kind, folder / "step-00000001")
    nothing, warnings = checkpoint.latest_valid(folder)
    assert nothing is None
    assert len(warnings) == 3


def test_what_is_loaded_is_what_was_saved(trained: tuple[CollaborationStep, Path]) -> None:
    step, folder = trained
    groups = create_groups(CASE.experts, timeout_seconds=300)
    other = build_step(CASE, groups, None)
    assert digests(engines_of(other)) != digests(engines_of(step))
    checkpoint.load(folder / "step-00000003", engines_of(other), experts=CASE.experts)
    assert digests(engines_of(other)) == digests(engines_of(step))
    assert (folder / "latest").read_text() == "step-00000003"


def test_weights_need_no_optimizer_files(trained: tuple[CollaborationStep, Path]) -> None:
    step, folder = trained
    newest = folder / "step-00000003"
    for path in newest.glob("*.optim.pt"):
        path.unlink()
    other = build_step(CASE, create_groups(CASE.experts, timeout_seconds=300), None)
    checkpoint.load(newest, engines_of(other), experts=CASE.experts, optimizer=False)
    for mine, theirs in zip(engines_of(other), engines_of(step), strict=True):
        for name, value in theirs.network.state_dict().items():
            assert torch.equal(mine.network.state_dict()[name], value)


def test_other_formats_counts_and_networks_are_refused(trained: tuple[CollaborationStep, Path]) -> None:
    step, folder = trained
    newest = folder / "step-00000003"
    with pytest.raises(InputError, match=r"it holds 3 experts, experts.count is 4; .coe-dist scale. changes the count"):
        checkpoint.load(newest, engines_of(step), experts=4)
    wide = reference.TinyNetwork(8, [reference.CLASSES])
    with pytest.raises(InputError, match=r"expert-0000.safetensors: it does not fit .* trunk.0.weight \[6, 1, 3, 3\]"):
        checkpoint.load_weights(newest, wide, "expert 0")
    with pytest.raises(InputError, match=r"expert-0007.safetensors: no such file"):
        checkpoint.load_weights(newest, wide, "expert 7")
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    groups = create_groups(CASE.experts, timeout_seconds=300)
    with pytest.raises(InputError, match="checkpoint format 2 is not allowed; this version reads format 1") as caught:
        checkpoint.agreed_save(folder, groups)
    assert str(newest) in str(caught.value)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_saves_are_kept(keep: int, tmp_path: Path) -> None:
    groups = create_groups(CASE.experts, timeout_seconds=300)
    step = build_step(CASE, groups, None)
    (tmp_path / ".partial-step-00000009").mkdir()  # a save that was interrupted
    for done in (1, 5, 9, 10):
        (tmp_path / ".partial-step-00000007").mkdir(exist_ok=True)
        save(tmp_path, step, groups, Position(done), keep=keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", *["step-00000009", "step-00000010"][2 - keep :]]
    assert checkpoint.latest_valid(tmp_path) == (tmp_path / "step-00000010", [])


def test_the_best_save_is_kept_besides_the_newest(tmp_path: Path) -> None:
    groups = create_groups(CASE.experts, timeout_seconds=300)
    step = build_step(CASE, groups, None)
    for done, top1 in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6), (5, 0.8), (6, 0.1)):
        made = save(tmp_path, step, groups, Position(done), keep=1)
        assert saving.mark_best(made, top1, keep=1) == (done in (1, 2, 5))  # an equal one is not better
        best = tmp_path / f"step-0000000{ {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5}[done] }"
        assert checkpoint.best_save(tmp_path) == (best, {1: 0.5, 2: 0.7, 5: 0.8}[int(best.name[-1])])
        assert checkpoint.complete_saves(tmp_path) == sorted({made, best}, reverse=True)
    (tmp_path / "best").write_text("{")
    assert checkpoint.best_save(tmp_path) is None


def test_training_may_go_on_while_a_save_is_written(tmp_path: Path) -> None:
    groups = create_groups(CASE.experts, timeout_seconds=300)
    step = build_step(CASE, groups, None)
    train(CASE, groups, step, 0, 1)
    before = digests(engines_of(step))
    pending = saving.start(tmp_path, engines_of(step), groups, Position(1), extra={"config": {}}, keep=1)
    train(CASE, groups, step, 1, 3)
    assert checkpoint.latest_valid(tmp_path) == (None, [])  # it does not exist before finish
    assert pending.finish() == tmp_path / "step-00000001"
    assert pending.bytes == sum(path.stat().st_size for path in pending.target.iterdir() if path.suffix != ".json")
    other = build_step(CASE, groups, None)
    checkpoint.load(pending.target, engines_of(other), experts=CASE.experts)
    assert digests(engines_of(other)) == before != digests(engines_of(step))


def test_a_start_that_was_replaced_publishes_nothing(tmp_path: Path) -> None:
    groups = create_groups(CASE.experts, timeout_seconds=300)
    engines, folder = engines_of(build_step(CASE, groups, None)), tmp_path / "checkpoints"
    first = Owner(tmp_path)
    made = saving.start(folder, engines, groups, Position(1), extra={}, keep=2, owner=first).finish()
    pending = saving.start(folder, engines, groups, Position(2), extra={}, keep=2, owner=first)
    second = Owner(tmp_path)
    with pytest.raises(TrainingError, match=r"a later start of this run has taken over"):
        pending.finish()
    assert checkpoint.complete_saves(folder) == [made]
    saving.start(folder, engines, groups, Position(2), extra={}, keep=2, owner=second).finish()
    assert checkpoint.latest_valid(folder) == (folder / "step-00000002", [])


def test_a_save_of_other_classes_is_refused(tmp_path: Path) -> None:
    groups = create_groups(CASE.experts, timeout_seconds=300)
    engines = engines_of(build_step(CASE, groups, None))
    classes = ["cat", "dog", "eel", "fox"]
    made = saving.start(tmp_path, engines, groups, Position(1), extra={"classes": classes}, keep=1).finish()
    checkpoint.load(made, engines, experts=CASE.experts, classes=classes)
    with pytest.raises(
        InputError, match=r"its classes are cat, dog, eel, \.\.\. \(4\), those of the data cat, eel, dog, "
    ):
        checkpoint.load(made, engines, experts=CASE.experts, classes=("cat", "eel", "dog", "fox"))


def test_a_full_disk_keeps_the_save_before_and_is_told_on_every_rank(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small-disk", "400k"):
        run_ranks(2, "training.checkpoint_cases:run_full_disk", tmp_path)
    told = [json.loads((tmp_path / f"messages-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert len(told[0]) == 3
    for message in told[0]:
        assert "could not be written (rank " in message
        assert "No space left on device); earlier ones are still valid" in message
        assert "checkpoints/step-0000000" in message
