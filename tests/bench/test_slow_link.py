"""The step's benchmark over a slow link tells where the time goes: in the exchange of images and in the mean of the
delegator's gradients, at least as long as the link needs for their bytes."""

from __future__ import annotations

import json
import subprocess
import sys

from namespaces import clean_environment, slow_network_command

from coe_dist.bench.step_system import configuration, global_batch, network_builder, rank_share
from coe_dist.parallel.exchange import HEADER_BYTES

RATE, BURST = 500_000, 8_000  # bytes per second, bytes


def test_parts_of_a_step_over_a_slow_link() -> None:
    bench = [sys.executable, "-m", "coe_dist", "bench", "step", "--quick", "--json"]
    done = subprocess.run(
        slow_network_command(bench, bytes_per_second=RATE, burst=BURST),
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [c for c in json.loads(done.stdout)["cases"] if c["case"]["world_size"] == 2]
    (two_experts,) = (c for c in cases if c["case"]["engine"] == "torch" and c["case"]["experts"] == 2)
    parts, samples = two_experts["ours"]["parts"], two_experts["case"]["samples"]

    # k = 2 of 2 experts on two ranks: each rank gets every image of the other
    images = rank_share(global_batch(samples, 0), 0, 2).images
    received = len(images) * (images[0].numel() + HEADER_BYTES)
    assert parts["dispatch"] >= (received - BURST) / RATE
    config = configuration(experts=2, per_sample=2, engine="torch", batch=samples)
    gradients = sum(4 * parameter.numel() for parameter in network_builder(config).delegator().parameters())
    assert parts["delegator_backward"] >= (gradients - BURST) / RATE  # an all-reduce brings each rank as much
    assert two_experts["ours"]["seconds"] >= (received + gradients - 2 * BURST) / RATE
