"""The demonstration: a collaboration beside its two single-network baselines, same recipe, one table and a report."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from coe_dist import tracking
from coe_dist.config import NetworkConfig, RunConfig, is_url
from coe_dist.data.beton import write_dataset
from coe_dist.errors import InputError
from coe_dist.orchestration.mirroring import mirrored
from coe_dist.orchestration.ray_session import session_for
from coe_dist.orchestration.runs import train_in
from coe_dist.orchestration.shares import check_workers
from coe_dist.training.run_folder import load_run_config, trained_network


def run_demo(config: RunConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the data if it is not there, trains three systems, and writes summary.json and report.html.

    Raises Preempted after a SIGTERM, when what is being trained is saved; called again it goes on from there.
    Returns the summary: {coe, single, single_same_macs, seconds, seed, expert_samples_per_image}.
    """
    from coe_dist.coe.backbones import classifier_with_macs
    from coe_dist.orchestration.reporting import report
    from coe_dist.training.checks import check_run

    if config.experts.network != "small_cnn":
        raise InputError(
            f"experts.network: {config.experts.network} is not allowed in the demonstration; give small_cnn, "
            "whose width makes the single network of the same MACs, or use `coe-dist train`"
        )
    if is_url(config.data.folder):
        raise InputError(
            f"data.folder: {config.data.folder} is not allowed here, where the data are written first; give a folder"
        )
    check_workers(config)
    started = time.perf_counter()
    folder = Path(config.data.folder)
    write_dataset(config.data.source, folder, progress=True)
    builder = check_run(config)
    seconds = {"data": time.perf_counter() - started}

    def timed(name: str, run_config: RunConfig, network: NetworkConfig | None, *, last: bool = False) -> Path:
        what = "the collaboration" if network is None else f"a single network ({network.network}, {network.options})"
        print(f"coe-dist: {run_config.name}: {what}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        run_dir = train_in(session, run_config, network=network, overwrite=overwrite, more_follows=not last)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return run_dir

    def same_macs(average_macs: float) -> NetworkConfig:
        options = classifier_with_macs(
            expert.network,
            expert.options,
            channels=builder.info.channels,
            classes=len(builder.info.classes),
            resolution=config.data.resolution,
            target_macs=average_macs,
        )
        return NetworkConfig(network=expert.network, options=options)

    expert = NetworkConfig(network=config.experts.network, options=config.experts.options)
    with session_for(config, None) as session:
        run_dir = timed("train_coe", config, None)
        coe = json.loads((run_dir / "evaluation-test.json").read_text())
        singles = {}
        for name in ("single", "single_same_macs"):
            baseline = config.model_copy(update={"name": f"{config.name}-{name.replace('_', '-')}"})
            network = expert
            if name == "single_same_macs":
                # one that is there stays: the collaboration may have been calibrated for another budget since
                known = None if overwrite else trained_network(baseline.run_dir)
                network = known or same_macs(coe["average_macs"])
            single_dir = timed("train_single", baseline, network, last=name == "single_same_macs")
            singles[name] = json.loads((single_dir / "evaluation-test.json").read_text())
    ends = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds["evaluate"] = next((line["evaluate_seconds"] for line in reversed(ends) if line["kind"] == "end"), 0.0)
    summary = {
        "coe": {"top1": coe["top1"]["coe"], "average_macs": coe["average_macs"]},
        "single": {"top1": singles["single"]["top1"], "macs": singles["single"]["macs"]},
        "single_same_macs": {"top1": singles["single_same_macs"]["top1"], "macs": singles["single_same_macs"]["macs"]},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": config.seed,
        "expert_samples_per_image": {
            "coe": config.expert_samples * config.training.epochs,
            "single": config.training.epochs,
            "single_same_macs": config.training.epochs,
        },
    }
    with mirrored(config, overwrite=False) as mirror:
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
        report([run_dir])
        if mirror is not None:
            mirror.start()
    tracking.log_artifacts(load_run_config(run_dir), tracking.run_id_of(run_dir), [run_dir / "summary.json"])
    return summary
