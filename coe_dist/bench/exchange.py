"""Our exchange against DeepSpeed's mixture-of-experts layer, dropless and top-1, doing the same job on gloo.

The job of a case: N images on two ranks go to their experts, whole networks; these run forward and backward; a loss per
image comes back. "seconds" is the time of the slowest rank, "cpu_seconds" of all ranks together. Ours includes making
the plan from the assignment, the peer's its gating. "equal" says that losses and all gradients agreed.

bytes_per_pair is what leaves a rank per (image, expert) when all experts are remote, bytes_back_per_pair what comes
back (for the peers their backward exchange included); both are counted at the collectives. bytes_sent is what all ranks
send in one repetition of the case's own load.
"""

from __future__ import annotations

from coe_dist.bench.ranks import measure_in_ranks
from coe_dist.bench.record import Record, case, machine, versions

WORLD_SIZE, EXPERTS = 2, 16
IMAGES = [([1, 28, 28], 1024), ([3, 64, 64], 256)]  # [C,H,W] and N
LOADS = ["balanced", "shuffled", "one"]  # see exchange_rank.make_work


def run_exchange_bench(*, quick: bool = False) -> Record:
    """Measures all cases; quick: small batches of the small images. record.py has the answer's form."""
    images = [(shape, 64) for shape, _ in IMAGES[:1]] if quick else IMAGES
    cases = [
        {"experts": EXPERTS, "samples": samples, "load": load, "image": shape}
        for shape, samples in images
        for load in LOADS
    ]
    request = {"cases": cases, "repeats": 2 if quick else 15}
    answers = measure_in_ranks("coe_dist.bench.exchange_rank", WORLD_SIZE, request, timeout_seconds=900)["answers"]
    return {
        "name": "exchange",
        "machine": machine(),
        "versions": versions("coe-dist", "torch", "deepspeed"),
        "cases": [
            case({"world_size": WORLD_SIZE, **fields}, answer["ours"], answer["peers"])
            for fields, answer in zip(cases, answers, strict=True)
        ],
    }
