"""The activation's benchmark runs and its ratios are those of its seconds; nothing here looks at a time."""

from __future__ import annotations

import json

import torch

from coe_dist.bench.run import run_bench, show


def test_quick_run() -> None:
    threads = torch.get_num_threads()
    record = run_bench("pwlu", quick=True)
    assert torch.get_num_threads() == threads
    assert record["name"] == "pwlu"
    assert record["versions"]["numba"] != "not installed"
    assert [measured["case"] for measured in record["cases"]] == [
        {"shape": [64, 64, 7, 7], "mode": mode} for mode in ("channel", "layer")
    ]
    for measured in record["cases"]:
        ours, silu = measured["ours"], measured["peers"]["silu"]
        assert ours["seconds"] > 0 < silu["seconds"]
        assert ours["times_silu"] == ours["seconds"] / silu["seconds"]
        assert silu["ratio"] == silu["seconds"] / ours["seconds"]
    json.dumps(record)
    show(record)
