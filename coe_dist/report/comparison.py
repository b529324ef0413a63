"""Several runs beside each other: their results, their curves in one figure, and what differs in their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coe_dist.report.folder import Network, Run
from coe_dist.report.plots import curves_svg
from coe_dist.tracking.store import flatten

_PLACE = ("name", "runs_dir")  # where a run lies, not what it is


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """For page.html: `rows` of results, `curves` as SVG, `settings` that differ as (name, values), all in order."""
    rows = [_row(run) for run in runs]
    first = rows[0]["top1"]
    for row in rows:
        known = first is not None and row["top1"] is not None
        row["difference"] = row["top1"] - first if known else None
    return {"rows": rows, "curves": curves_svg(runs, "all-curves"), "settings": differences(runs)}


def _row(run: Run) -> dict[str, Any]:
    evaluation = run.evaluation
    row: dict[str, Any] = {"name": run.name, "experts": None if run.baseline else run.start.get("experts")}
    row |= {"seconds": run.seconds, "epochs": run.start.get("epochs")}
    if evaluation is not None:
        own, oracle = evaluation.top1.coe, evaluation.top1.oracle
        return row | {"top1": own, "macs": evaluation.average_macs, "split": evaluation.split, "oracle": oracle}
    if run.single is not None:
        return row | {"top1": run.single.top1, "macs": run.single.macs, "split": run.single.split, "oracle": None}
    return row | {"top1": run.last("val/top1"), "macs": None, "split": "validation", "oracle": None}


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What not all runs share, each with its value in every run ("" where a run does not have it, "–" where its
    configuration cannot be read): what is trained, then the settings."""
    return _differing([trained(run) for run in runs]) + _differing([settings_of(run.config) for run in runs])


def trained(run: Run) -> dict[str, str]:
    """What a run trains, which its configuration does not tell: that of a single network is a collaboration's."""
    if not run.baseline:
        return {"trained": "collaboration"}
    alone = run.network or Network()
    return {"trained": "one network alone", **flatten(alone.model_dump(), "single.")}


def _differing(settings: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    names = sorted(set().union(*settings).difference(_PLACE), key=lambda name: (name != "trained", name))
    differing = [name for name in names if len({values.get(name) for values in settings if values}) > 1]
    return [(name, [values.get(name, "") if values else "–" for values in settings]) for name in differing]


def settings_of(config: str) -> dict[str, str]:
    """The settings in a config.yaml, by dotted name and without secrets; none where it cannot be read."""
    return flatten(tree_of(config))


def tree_of(config: str) -> dict[str, Any]:
    """The content of a config.yaml; empty where it cannot be read."""
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.create(config))
    except Exception:  # YAML's and OmegaConf's errors have no common parent
        return {}
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}
