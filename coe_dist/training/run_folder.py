"""The run folder: who may create it, resume it or replace it, and the configuration it was trained with."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coe_dist.config import NetworkConfig, RunConfig, parse_config
from coe_dist.errors import InputError
from coe_dist.training.stopping import clear_stop

_NETWORK = "network.json"
RESUMABLE = {
    f"training.{name}"
    for name in ("epochs", "evaluate_every", "checkpoint_every", "checkpoint_every_steps", "keep_checkpoints")
} | {"data.staging.folder", "data.staging.keep_gigabytes"}
RESUMABLE_SECTIONS = {"workers", "tracking", "early_exit", "storage"}


def check_folder(config: RunConfig, *, overwrite: bool) -> None:
    """Raises InputError when an existing run folder must not be replaced, or not be resumed with this configuration.

    Changes nothing.
    """
    run_dir = config.run_dir
    stored = run_dir / "config.yaml"
    if overwrite and run_dir.exists() and not stored.is_file():
        raise InputError(f"{run_dir}: it is not a run folder (no config.yaml), so --overwrite leaves it alone")
    if overwrite or not stored.is_file():
        return
    before = load_run_config(run_dir).model_dump(mode="json")
    changed = sorted(_differences(before, config.model_dump(mode="json")))
    refused = [key for key in changed if key not in RESUMABLE and key.split(".")[0] not in RESUMABLE_SECTIONS]
    if refused:
        raise InputError(
            f"{refused[0]}: {_at(config.model_dump(mode='json'), refused[0])} is not allowed; the run in {run_dir}, "
            f"which would be resumed, has {_at(before, refused[0])}; give that, another name, or --overwrite"
        )


def prepare_folder(config: RunConfig, *, overwrite: bool) -> Path:
    """Creates the run folder, or makes an existing one ready to be resumed (wishes to stop it are forgotten); refuses
    what check_folder refuses."""
    check_folder(config, overwrite=overwrite)
    run_dir = config.run_dir
    stored = run_dir / "config.yaml"
    try:
        if overwrite and run_dir.exists():
            shutil.rmtree(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_name(".config.yaml.partial")
        temporary.write_text(config.to_yaml())
        temporary.replace(stored)
        clear_stop(run_dir)
    except OSError as error:
        raise InputError(f"runs_dir: {config.runs_dir} is not allowed; {run_dir}: {error.strerror}") from error
    return run_dir


def evaluation_file(split: str, *, stored: bool) -> str:
    """Name of the file with a split's figures: the run's own, or those of a question that stores nothing."""
    return f"evaluation-{split}.json" if stored else f"asked-{split}.json"


def check_network(run_dir: Path, network: NetworkConfig) -> None:
    """Remembers the single network a run folder trains. Raises InputError when it has trained another one."""
    path, text = run_dir / _NETWORK, network.model_dump_json()
    if path.is_file() and path.read_text() != text:
        raise InputError(f"{run_dir}: it has trained another network ({path.read_text()}); give --overwrite")
    path.write_text(text)


def trained_network(run_dir: Path) -> NetworkConfig | None:
    """The single network that a run folder trains; None for a collaboration's, and where nothing is yet."""
    path = run_dir / _NETWORK
    return NetworkConfig.model_validate_json(path.read_text()) if path.is_file() else None


@contextmanager
def locked(config: RunConfig) -> Iterator[None]:
    """Keeps a second training out of the run folder. Raises InputError when there is one."""
    config.run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = config.run_dir.parent / f".{config.name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"name: {config.name} is not allowed; that run is being trained right now") from None
        yield


def load_run_config(run_dir: str | Path) -> RunConfig:
    """The configuration a run folder was trained with; its name and place are those of the folder."""
    from omegaconf import OmegaConf

    run_dir = Path(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir}: it is not a run folder (no config.yaml)")
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return parse_config(content | {"name": run_dir.resolve().name, "runs_dir": str(run_dir.parent)})


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key in before.keys() | after.keys():
        old, new, name = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict) and key != "options":
            found |= _differences(old, new, f"{name}.")
        elif old != new and name not in ("name", "runs_dir"):
            found.add(name)
    return found


def _at(content: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        content = content[part]
    return content
