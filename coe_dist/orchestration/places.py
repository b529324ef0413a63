"""Where the relative paths of a configuration lie when the process does not run in the user's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig, is_url, parse_config


def placed_in(config: RunConfig, folder: Path) -> RunConfig:
    """The same configuration with every relative path (runs, data, copies, weights, MLflow's sqlite file) below
    `folder`."""
    base, content = folder.expanduser().absolute(), config.model_dump()
    content["runs_dir"] = str(base / config.runs_dir)
    if not is_url(config.data.folder):
        content["data"]["folder"] = str(base / config.data.folder)
    if not (config.data.staging.folder or "").startswith("~"):
        _place(content["data"]["staging"], "folder", base)
    for section, key in (("delegator", "initial_weights"), ("experts", "initial_weights"), ("distillation", "weights")):
        _place(content[section], key, base)
    uri = config.tracking.uri or ""
    if (path := uri.removeprefix("sqlite:///")) != uri:
        content["tracking"]["uri"] = f"sqlite:///{base / path}"
    return parse_config(content)


def _place(section: dict[str, Any] | None, key: str, base: Path) -> None:
    if section is not None and section[key] is not None:
        section[key] = str(base / section[key])
