"""From a YAML file and dotted overrides, or plain dictionaries, to a validated configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from coe_dist.config.messages import describe
from coe_dist.config.run import RunConfig
from coe_dist.config.sections import Section
from coe_dist.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as `training.epochs=3`.

    Raises InputError (one line) for a missing file, broken YAML, an unknown key or a value that is not allowed.
    """
    return parse_config(read_yaml(path, overrides))


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The file's content with the overrides, as plain dictionaries. Raises InputError as load_config does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise InputError(f"{path}: the top level must be a mapping of keys such as `name`, `data`, `training`")
        for override in overrides:
            if not re.match(r"^[A-Za-z_][\w.]*=", override):
                raise InputError(
                    f"override {override!r} is not allowed; write key=value, for instance training.epochs=3"
                )
        tree = _merged(tree, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(tree, resolve=True)
    except InputError:
        raise
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise InputError(f"{path}: {_first_line(error)}") from error
    except Exception as error:  # PyYAML's own error classes
        if type(error).__module__.startswith("yaml"):
            raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        raise


def _merged(tree: DictConfig, overrides: DictConfig) -> DictConfig:
    """What merge gives; where that refuses (a list for a mapping, or the other way round) the override, so that the
    schema can say what is allowed there."""
    for key, value in overrides.items_ex(resolve=False):
        before = OmegaConf.select(tree, str(key))
        if OmegaConf.is_dict(before) and OmegaConf.is_dict(value):
            tree[key] = _merged(before, value)
        else:
            tree[key] = value
    return tree


def parse_config(content: Any) -> RunConfig:
    """Builds a RunConfig from plain dictionaries; InputError names the first field that is not allowed."""
    return parse(RunConfig, content)


Schema = TypeVar("Schema", bound=Section)


def parse(schema: type[Schema], content: Any) -> Schema:
    """The same for any schema made of Sections."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise InputError(describe(error, schema)) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
