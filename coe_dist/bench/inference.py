"""Answering with a trained collaboration against CondConv, one plain network and a soft mixture, at equal MACs.

One image costs the same on average in all systems (inference_families.py), but in the soft mixture, which runs all 8
experts. EXIT_RATE of the images end at the delegator. "macs" are those of one image, counted by torch's flop counter
(CondConv's mixing of kernels included; the case's own average for ours).

setting "supplied": every network as its library supplies it, with the C library's allocator as it is. "kept": the same
networks (of ONE_FAMILY), the allocator told to keep freed memory (allocator.py). "tuned": also BatchNorm folded and
weights packed everywhere, and every system in the memory layout that is fastest for it at this batch size ("variant").

condconv_batched   timm's forward: a grouped convolution with a group for each image
condconv_loop      an ordinary convolution with its mixed kernel for each image
condconv_best      the fastest form that we know: every layer in the form (inference_condconv.py) that is fastest for
                   it, the batch whole or in chunks side by side, whatever is faster. CondConv's own cost remains: a
                   kernel for each image is written and read, and cannot be packed beforehand.
plain, plain_best  one network; the batch whole, or in chunks side by side where that is faster
soft_mixture       all experts on every image
by_hand            delegator, then expert called directly, the expert known beforehand; batch 1 only

"operations" and "bytes" are counted for one batch (inference_work.py), the first one.

All take turns in rounds; "seconds" is the median round's mean for one batch, p50 and p95 are of single calls.
"page_faults": of the process, for each image. With 8 images and 8 experts a group has about one image: there the dense
batches, and their advantage, are gone.

setting "options": what each option of our model does; ours is the tuned model in float32, "same_class" the share of
images with the same answer.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from coe_dist.allocator import keep_freed_memory
from coe_dist.bench.fastest import fastest
from coe_dist.bench.inference_checks import Reference, answered, batches_of, check_ours, check_peers, one_by_one
from coe_dist.bench.inference_families import EXPERTS, FAMILIES
from coe_dist.bench.inference_networks import EXIT_RATE, Networks, build_networks
from coe_dist.bench.inference_systems import PACKED_FOR, Batch, Run, answer_of, systems
from coe_dist.bench.inference_work import count_work
from coe_dist.bench.record import Record, case, machine, versions

BATCHES, OPTION_BATCHES = (1, 8, 64, 256), (1, 64)
ONE_FAMILY = "100M"  # whose settings "kept" and "options" are measured
ROUNDS, SECONDS = 7, 20  # of one case: fewer rounds when they take longer
FAR = 4.0  # times the fastest system's seconds


def run_inference_bench(*, quick: bool = False) -> Record:
    """Measures all cases; quick: the light family, few images, without batches of 64 and 256 and compiling. record.py
    has the answer's form. The process's allocator keeps freed memory afterwards. Raises AssertionError when systems
    that must agree do not."""
    rounds, batches, option_batches = (2, (1, 8), (8,)) if quick else (ROUNDS, BATCHES, OPTION_BATCHES)
    names = ["light"] if quick else list(FAMILIES)
    built = {name: build_networks(FAMILIES[name], 16 if quick else max(BATCHES)) for name in names}
    references = {name: one_by_one(networks) for name, networks in built.items()}
    cases = []
    family = "light" if quick else ONE_FAMILY
    for setting, measured in (("supplied", names), ("kept", [family]), ("tuned", names)):
        if setting == "kept":
            keep_freed_memory()
        for name in measured:
            fields = {"networks": name, "setting": setting}
            cases += [_case(fields, built[name], references[name], batch, rounds) for batch in batches]
    for batch in option_batches:
        cases.append(_options_case(family, built[family], references[family], batch, rounds, compiled=not quick))
    packages = versions("coe-dist", "torch", "timm")
    return {"name": "inference", "machine": machine(), "versions": packages, "cases": cases}


def _case(fields: dict[str, Any], networks: Networks, reference: Reference, batch: int, rounds: int) -> Record:
    batches = batches_of(networks, batch, reference)
    found = systems(networks, batch, tuned=fields["setting"] == "tuned")
    exempt = max(check_ours(run, networks, batch, reference) for run in found["ours"].values())
    check_peers(found, batches[0])
    few = batches[: max(1, len(batches) // 4)]
    chosen = {
        name: fastest({variant: partial(_seconds, run, few) for variant, run in variants.items()})
        for name, variants in found.items()
    }
    figures = _in_turns({name: found[name][variant] for name, variant in chosen.items()}, batches, rounds)
    count = sum(len(part.images_NCHW) for part in batches)
    answer = reference.answer
    for name, figure in figures.items():
        figure["variant"] = chosen[name]
        if name != "soft_mixture":  # all experts' work, and the slowest to count
            figure |= count_work(found[name][chosen[name]], batches[0])
        if name.startswith(("plain", "condconv")):
            figure["macs"] = networks.macs[name.partition("_")[0]]
        elif name == "soft_mixture":
            figure["macs"] = networks.macs["delegator"] + EXPERTS * networks.macs["expert"]
    figures["ours"] |= {"macs": round(float(answer.macs_N[:count].double().mean())), "exempt": exempt}
    exited, *loads = torch.bincount(answer.expert_N[:count] + 1, minlength=EXPERTS + 1).tolist()
    fields = {"batch": batch, **fields, "exit_rate": exited / count, "loads": loads}
    return case(fields, figures.pop("ours"), figures)


def _options_case(
    family: str, networks: Networks, reference: Reference, batch: int, rounds: int, *, compiled: bool
) -> Record:
    batches = batches_of(networks, batch, reference)
    packed = networks.collaboration.packed(networks.images_NCHW[:PACKED_FOR]).to(memory_format=torch.channels_last)
    fused = networks.collaboration.fused()
    in_bf16 = networks.collaboration.fused().to(memory_format=torch.channels_last)
    in_bf16.precision = "bf16"
    models = {
        "ours": packed,
        "as_it_is": networks.collaboration,
        "fused": fused,
        "fused_channels_last": networks.collaboration.fused().to(memory_format=torch.channels_last),
        "bf16": in_bf16,
    }
    if compiled:
        models |= {"compiled": models["fused_channels_last"].compiled(), "compiled_bf16": in_bf16.compiled()}
    runs = {name: answer_of(model) for name, model in models.items()}
    answers = {name: answered(run, batches) for name, run in runs.items()}  # also compiles
    figures = _in_turns(runs, batches, rounds)
    for name, figure in figures.items():
        same = answers[name].probabilities_NC.argmax(1) == answers["ours"].probabilities_NC.argmax(1)
        expert = answers[name].expert_N == answers["ours"].expert_N
        figure |= {"same_class": float(same.double().mean()), "same_expert": float(expert.double().mean())}
    fields = {"batch": batch, "networks": family, "setting": "options", "exit_rate": EXIT_RATE}
    return case(fields, figures.pop("ours"), figures)


def _in_turns(runs: Mapping[str, Run], batches: list[Batch], rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each system; in every round each runs all batches, another system first each time. When a round
    takes long, systems that are FAR from the fastest sit out the others."""
    calls: dict[str, list[list[float]]] = {name: [] for name in runs}
    faults = dict.fromkeys(runs, 0)
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before = _page_faults()
            calls[name].append(_seconds(runs[name], batches))
            faults[name] += _page_faults() - before
        used = {name: sum(map(sum, calls[name])) for name in calls}
        if sum(used.values()) > SECONDS and number:
            break
        if sum(used.values()) > SECONDS / 2:
            names = [name for name in names if used[name] <= FAR * min(used.values())]
    images = len(batches[0].images_NCHW)
    return {
        name: _figures(rounds_of, images) | {"page_faults": faults[name] / (len(rounds_of) * len(batches) * images)}
        for name, rounds_of in calls.items()
    }


def _figures(rounds: list[list[float]], images: int) -> dict[str, Any]:
    means = [statistics.fmean(calls) for calls in rounds]
    seconds = statistics.median(means)
    single = torch.tensor([second for calls in rounds for second in calls], dtype=torch.float64)
    return {
        "seconds": seconds,
        "images_per_second": images / seconds,
        "p50": float(single.quantile(0.5)),
        "p95": float(single.quantile(0.95)),
        "spread": (max(means) - min(means)) / seconds,
        "rounds": len(rounds),
    }


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@torch.inference_mode()
def _seconds(run: Run, batches: list[Batch]) -> list[float]:
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    return seconds
