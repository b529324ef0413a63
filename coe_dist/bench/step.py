"""Our whole training step against a plain PyTorch loop, and how its time grows with the number of experts.

The demonstration's networks (small_cnn experts of 240 thousand MACs, a delegator of 42 thousand), N synthetic 28x28
images, k = 2, SGD included; both engines. One thread per rank. "seconds" is the time of the slowest rank, "cpu_seconds"
of all ranks together; "parts" are wall seconds of rank 0, measured in steps of their own.

Against `plain_loop` (step_peers.py), on one rank: the same networks and the same number of images for each, but no
routing, no exchange and one optimizer for all. Both sides take turns in one process. "equal" says that from the same
start one step of ours, and one of the loop on the dispatch sets, labels and weights that ours had recorded, gave the
same parameters and running statistics to 1e-5 of the tensor's largest value.

"growth", on two ranks: seconds at this E / seconds at the smallest E of the same engine, "growth_cpu" the same of the
CPU seconds; all E of an engine and both engines take turns.
"""

from __future__ import annotations

from typing import Any

from coe_dist.bench.ranks import measure_in_ranks
from coe_dist.bench.record import Record, case, machine, versions

ENGINES = ["torch", "deepspeed"]
SAMPLES, PER_SAMPLE = 1024, 2
PLAIN_EXPERTS, GROWTH_EXPERTS = [4, 32], [2, 4, 8, 16, 32]


def run_step_bench(*, quick: bool = False) -> Record:
    """Measures all cases; quick: a small batch and few experts. record.py has the answer's form."""
    samples, repeats = (64, 2) if quick else (SAMPLES, 15)
    plain = _answers(1, [2] if quick else PLAIN_EXPERTS, samples, repeats)
    growth = _answers(2, [2, 4] if quick else GROWTH_EXPERTS, samples, repeats)
    for engine in ENGINES:
        ours = [answer["ours"] for system, answer in growth if system["engine"] == engine]
        for figures in ours:
            figures["growth"] = figures["seconds"] / ours[0]["seconds"]
            figures["growth_cpu"] = figures["cpu_seconds"] / ours[0]["cpu_seconds"]
    cases = [
        case(
            {"world_size": world_size, "experts_per_sample": PER_SAMPLE, "samples": samples, **system},
            answer["ours"],
            answer["peers"],
        )
        for world_size, answers in ((1, plain), (2, growth))
        for system, answer in answers
    ]
    return {
        "name": "step",
        "machine": machine(),
        "versions": versions("coe-dist", "torch", "deepspeed", "numba"),
        "cases": cases,
    }


def _answers(world_size: int, experts: list[int], samples: int, repeats: int) -> list[tuple[dict[str, Any], Record]]:
    systems = [{"experts": count, "engine": engine} for engine in ENGINES for count in experts]
    request = {"systems": systems, "samples": samples, "experts_per_sample": PER_SAMPLE, "repeats": repeats}
    answers = measure_in_ranks("coe_dist.bench.step_rank", world_size, request, timeout_seconds=900)["answers"]
    return list(zip(systems, answers, strict=True))
