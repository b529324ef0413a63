"""Another number of experts: answers, rows and momentum are the parents', and training goes on."""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from trained_run import INFO, images_of, job_of, real_run, run_on_two_ranks, small_run, write_loads

from coe_dist.coe.collaboration import Answer, CollaborationOfExperts
from coe_dist.config import load_config
from coe_dist.errors import InputError
from coe_dist.training.checkpoint import latest_valid, load_weights, network_file
from coe_dist.training.inspection import inspect_run
from coe_dist.training.networks import NetworkBuilder
from coe_dist.training.parents import choose_parents
from coe_dist.training.scaling import scale


@given(st.lists(st.integers(0, 64), min_size=2, max_size=9), st.integers(1, 9))
@settings(max_examples=60)
def test_the_most_loaded_is_split_again_and_again(counts: list[int], new: int) -> None:
    loads = [count / 64 for count in counts]
    heap = [(-load, expert, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    expected = list(range(len(loads)))
    for child in range(len(loads), len(loads) + new):
        load, expert, parent = heapq.heappop(heap)
        for half in (expert, child):
            heapq.heappush(heap, (load / 2, half, parent))
        expected.append(parent)
    assert choose_parents(len(loads), len(loads) + new, (), loads) == expected


@given(st.data())
@settings(max_examples=60)
def test_the_named_and_the_most_used_are_kept(data: st.DataObject) -> None:
    loads = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5]), min_size=3, max_size=8))
    after = data.draw(st.integers(2, len(loads) - 1))
    named = data.draw(st.lists(st.integers(0, len(loads) - 1), max_size=after))
    kept = choose_parents(len(loads), after, named, loads)
    assert kept == sorted(set(kept))
    assert len(kept) == after
    assert set(named) <= set(kept)
    chosen, left = set(kept) - set(named), set(range(len(loads))) - set(kept)
    assert all((loads[c], -c) > (loads[d], -d) for c in chosen for d in left)


def test_named_parents() -> None:
    assert choose_parents(4, 6, [2], None) == [0, 1, 2, 3, 2, 2]
    assert choose_parents(4, 6, [3, 1], None) == [0, 1, 2, 3, 3, 1]
    assert choose_parents(6, 3, [5, 0, 2], None) == [0, 2, 5]


def answers(run: Path, images: torch.Tensor, threshold: float) -> Answer:
    """What the newest save of a run answers, through networks built as training builds them."""
    config = load_config(run / "config.yaml")
    builder, (save, _) = NetworkBuilder(config, INFO), latest_valid(run / "checkpoints")
    assert save is not None
    names = ["delegator", *(f"expert {expert}" for expert in range(config.experts.count))]
    networks = [builder.delegator(), *(builder.expert(expert) for expert in range(config.experts.count))]
    for name, network in zip(names, networks, strict=True):
        load_weights(save, network, name)
    model = CollaborationOfExperts(
        networks[0],
        networks[1:],
        threshold=threshold,
        final="expert",
        delegator_macs=1,
        expert_macs=[10] * config.experts.count,
    )
    return model.eval()(images)


def with_config(run: Path, config_of: Path) -> Path:
    content = json.loads((config_of / "manifest.json").read_text())["config"]
    (run / "config.yaml").write_text(json.dumps(content))
    return run


@pytest.mark.parametrize("loads", [[0.1, 0.2, 0.6, 0.1], [0.25, 0.25, 0.25, 0.25], [0.9, 0.1, 0.0, 0.0]])
def test_without_noise_every_answer_stays(loads: list[float], tmp_path: Path) -> None:
    run = small_run(tmp_path, 4)
    with_config(run, run / "checkpoints" / "step-00000003")
    write_loads(run, loads)
    images = images_of(400, seed=9)
    rough_NC = answers(run, images, threshold=0.0).probabilities_NC
    threshold = float(rough_NC.amax(1).quantile(0.7))
    before = answers(run, images, threshold)
    assert len(before.expert_N.unique()) == 5, "all four experts and early exit must occur"
    for experts in (5, 9):
        scaled = scale(run, experts=experts, out=tmp_path / f"grown{experts}", noise=0.0)
        after = answers(scaled.run_dir, images, threshold)
        parents = torch.tensor([*scaled.parents, -1])  # the last is for early exit's -1
        assert torch.equal(parents[after.expert_N], before.expert_N)
        assert torch.equal(after.macs_N, before.macs_N)
        assert torch.equal(after.probabilities_NC.argmax(1), before.probabilities_NC.argmax(1))
        torch.testing.assert_close(after.probabilities_NC, before.probabilities_NC, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "named"), [(4, 6, ()), (4, 7, (1,)), (6, 3, (4,)), (5, 4, ()), (4, 6, (2, 0))]
)
def test_weights_rows_and_momentum_are_the_parents(
    before: int, after: int, named: Sequence[int], tmp_path: Path
) -> None:
    run = small_run(tmp_path, before)
    write_loads(run, [1 / (2 + expert) for expert in range(before)])
    scaled = scale(run, experts=after, out=tmp_path / "scaled", named=named, noise=0.0)
    old, new, parents = run / "checkpoints" / "step-00000003", scaled.save, scaled.parents
    assert latest_valid(tmp_path / "scaled" / "checkpoints") == (new, [])
    assert (new.parent / "latest").read_text() == "step-00000003"
    stems = ["delegator", *(network_file(f"expert {expert}") for expert in range(after))]
    expected = {"manifest.json", *(f"{stem}.{end}" for stem in stems for end in ("safetensors", "optim.pt"))}
    assert {path.name for path in new.iterdir()} == expected
    for expert, parent in enumerate(parents):
        for end in ("safetensors", "optim.pt"):
            files = [old / f"expert-{parent:04d}.{end}", new / f"expert-{expert:04d}.{end}"]
            assert files[0].read_bytes() == files[1].read_bytes()
    states = [torch.load(save / "delegator.optim.pt", weights_only=True) for save in (old, new)]
    tables = [(load_file(old / "delegator.safetensors"), load_file(new / "delegator.safetensors"))]
    tables += [
        (
            {n: s["momentum_buffer"] for n, s in states[0].items()},
            {n: s["momentum_buffer"] for n, s in states[1].items()},
        )
    ]
    for was, now in tables:
        assert list(was) == list(now)
        for name in was:
            if name.startswith("selection_head"):
                assert len(was[name]) == before
                assert was[name].abs().sum() > 0
                for row, parent in enumerate(parents):
                    assert torch.equal(now[name][row], was[name][parent])
                assert len(now[name]) == after
            else:
                assert torch.equal(now[name], was[name])
    config = load_config(tmp_path / "scaled" / "config.yaml")
    assert (config.run_dir, config.experts.count, config.experts.per_sample) == (tmp_path / "scaled", after, 3)
    assert json.loads((new / "manifest.json").read_text())["config"] == config.model_dump(mode="json")


def test_noise_moves_parameters_alone_and_is_reproducible(tmp_path: Path) -> None:
    run = small_run(tmp_path, 4)
    scaled = scale(run, experts=6, out=tmp_path / "a", named=[1], noise=0.05)
    again = scale(run, experts=6, out=tmp_path / "b", named=[1], noise=0.05)
    files = [load_file(scaled.save / f"expert-{expert:04d}.safetensors") for expert in (1, 4, 5)]
    assert (scaled.save / "expert-0004.safetensors").read_bytes() == (
        again.save / "expert-0004.safetensors"
    ).read_bytes()
    parent, first, second = files
    assert sum(torch.equal(first[name], second[name]) for name in parent) == sum(
        torch.equal(first[name], parent[name]) for name in parent
    )
    for name, value in parent.items():
        moved = (first[name] - value).float()
        if name.startswith("normalise") or "running" in name or "num_batches" in name:
            assert not moved.any()
        elif value.numel() > 500:
            assert 0.04 < float(moved.norm() / value.norm()) < 0.06
        else:
            assert moved.any()
    head = load_file(scaled.save / "delegator.safetensors")["selection_head.weight"]
    assert torch.equal(head[4], head[1])


def test_fewer_experts_than_per_sample(tmp_path: Path) -> None:
    run = small_run(tmp_path, 4)
    scaled = scale(run, experts=2, out=tmp_path / "two", named=[3, 0])
    assert scaled.notes == ["experts.per_sample: 3 -> 2, there are no more experts"]
    assert load_config(tmp_path / "two" / "config.yaml").experts.per_sample == 2
    assert scaled.parents == [0, 3]


def test_a_damaged_save_is_passed_over_with_a_note(tmp_path: Path) -> None:
    run = small_run(tmp_path, 4, steps=(2, 3))
    (run / "checkpoints" / "step-00000003" / "delegator.optim.pt").write_bytes(b"")
    write_loads(run, [0.1, 0.2, 0.3, 0.4], step=3)
    scaled = scale(run, experts=5, out=tmp_path / "five", named=[0])
    assert scaled.save.name == "step-00000002"
    assert "step-00000003 is damaged" in scaled.notes[0]
    assert scaled.notes[1:] == ["how often each expert is chosen is that of step 3, none is recorded for step 2"]


def test_what_is_refused(tmp_path: Path, command: Callable[..., Any]) -> None:
    def refused(*arguments: object) -> str:
        """The one line of `coe-dist scale ARGUMENTS`, which must exit with 2."""
        code, output, errors = command("scale", *arguments)
        assert (code, output, len(errors.splitlines())) == (2, "", 1), errors
        return errors.removeprefix("coe-dist: ")

    run, out = small_run(tmp_path, 4), tmp_path / "out"
    (tmp_path / "there").mkdir()
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step-00000003" / "expert-0002.safetensors").unlink()
    cases = [
        (["--experts", "1", "--out", out], "--experts: 1 is not allowed; give a whole number from 2 to 4096"),
        (["--experts", "4097", "--out", out], "--experts: 4097 is not allowed"),
        (["--experts", "4", "--out", out], "--experts: 4 is not allowed; the run has 4 experts already"),
        (["--experts", "6", "--out", out], "it records no loads of its experts; name experts with --from-expert"),
        (["--experts", "6", "--out", out, "--from-expert", "4"], "--from-expert: 4 is not allowed; the run has the"),
        (["--experts", "6", "--out", out, "--from-expert", "-1"], "--from-expert: -1 is not allowed"),
        (
            ["--experts", "7", "--out", out, "--from-expert", "1", "--from-expert", "2"],
            "--from-expert: 2 parents are not allowed; give one, or one for each of 3 new experts",
        ),
        (
            ["--experts", "2", "--out", out, *["--from-expert", "0", "--from-expert", "1", "--from-expert", "2"]],
            "--from-expert: 3 experts are not allowed; only 2 can be kept",
        ),
        (["--experts", "6", "--out", out, "--from-expert", "1", "--split", "most-loaded"], "give only one of them"),
        (["--experts", "6", "--out", out, "--noise", "-1"], "--noise: -1.0 is not allowed"),
        (["--experts", "6", "--out", tmp_path / "there"], "there is not allowed; it exists already"),
        (
            ["--experts", "6", "--out", tmp_path / "a b", "--from-expert", "1"],
            "--out: 'a b' is not allowed; give",
        ),
        (["--experts", "6", "--out", run / "config.yaml" / "x", "--from-expert", "1"], "it cannot be written (Not a"),
    ]
    (run / "config.yaml").write_text("")  # a file, in the way of --out
    for source, words in ((tmp_path / "nowhere", ""), (tmp_path / "broken", "expert-0002.safetensors is missing")):
        message = refused(source, "--experts", "6", "--out", out)
        assert message.startswith(f"{source}: it holds no valid checkpoint")
        assert words in message
    for arguments, words in cases:
        assert words in refused(run, *arguments)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_delegator_without_the_rows_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path, 4)
    manifest = run / "checkpoints" / "step-00000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["router.pt"] = content["files"]["delegator.optim.pt"]
    shutil.copy(manifest.with_name("delegator.optim.pt"), manifest.with_name("router.pt"))
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"router.pt is a file that this version does not know how to scale"):
        scale(run, experts=5, out=tmp_path / "out", named=[0])
    assert not list(tmp_path.glob("*out*"))


def test_a_real_run_keeps_its_accuracy_and_training_goes_on(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    run = real_run(tmp_path_factory.getbasetemp())
    grown = scale(run, experts=5, out=tmp_path / "grown", noise=0.0)
    shrunk = scale(run, experts=2, out=tmp_path / "shrunk")
    before = json.loads((run / "evaluation-test.json").read_text())
    equal, trained, small = run_on_two_ranks(
        tmp_path,
        [
            job_of(grown.run_dir, "evaluate"),
            job_of(grown.run_dir, "train", "training.epochs=3"),
            job_of(shrunk.run_dir, "train", "training.epochs=3"),
        ],
    )
    for system in ("coe", "delegator", "oracle"):
        assert equal["top1"][system] == before["top1"][system]
    assert equal["top1"]["experts"] == [before["top1"]["experts"][parent] for parent in grown.parents]
    assert len(trained["load"]) == 5
    assert len(small["load"]) == 2
    for scaled in (grown, shrunk):
        records = [json.loads(line) for line in (scaled.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert records[0]["kind"] == "start"
        assert records[0]["step"] == 8
        newest, problems = latest_valid(scaled.run_dir / "checkpoints")
        assert newest is not None
        assert (newest.name, problems) == ("step-00000012", [])
        hashes = [network["sha256"] for network in inspect_run(scaled.run_dir)["networks"]]
        assert len(set(hashes)) == len(scaled.parents) + 1, "copies must have moved apart"
    for child in (3, 4):
        weights = [
            load_file(save / f"expert-{expert:04d}.safetensors")["class_head.weight"]
            for save, expert in (
                (grown.save, child),
                (grown.run_dir / "checkpoints" / "step-00000012", child),
                (grown.run_dir / "checkpoints" / "step-00000012", grown.parents[child]),
            )
        ]
        assert float((weights[1] - weights[0]).norm()) > 1e-3
        assert float((weights[1] - weights[2]).norm()) > 1e-3
