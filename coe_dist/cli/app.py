"""The application, its groups, and the arguments that several commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from coe_dist.errors import InputError

# where --help shows a command
TRAIN, USE, SEE, GROUPS = "Train", "Use a trained run", "See and measure", "Groups of commands"

app = typer.Typer(
    name="coe-dist",
    help="Train and use a Collaboration of Experts: a delegator answers an image itself or picks one of E experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(no_args_is_help=True, help="Write, check and look at data sets.")
app.add_typer(data_app, name="data", rich_help_panel=GROUPS)
storage_app = typer.Typer(no_args_is_help=True, help="Runs in a store, such as s3://bucket/runs.")
app.add_typer(storage_app, name="storage", rich_help_panel=GROUPS)
export_app = typer.Typer(no_args_is_help=True, help="Turn a run into something that needs no run.")
app.add_typer(export_app, name="export", rich_help_panel=GROUPS)
mlflow_app = typer.Typer(no_args_is_help=True, help="What MLflow has not yet received of a run.")
app.add_typer(mlflow_app, name="mlflow", rich_help_panel=GROUPS)

ConfigPath = Annotated[
    Path, typer.Argument(help="A YAML file, for instance configs/fashion_mnist.yaml", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as training.epochs=3 experts.count=8", show_default=False)
]
RunPlace = Annotated[
    str, typer.Argument(help="A run folder, for instance runs/demo, or its address in a store", show_default=False)
]
WeightsOption = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(help="The moving averages of the weights, or the last step's; by default averages if there are some."),
]
CheckpointOption = Annotated[
    str, typer.Option(help="Which save: latest, best (on validation), or a number of optimizer steps.")
]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster.")]
Dashboard = Annotated[
    str | None, typer.Option(help="Dashboard of the Ray head; by default RAY_API_SERVER_ADDRESS or this machine's.")
]
LaunchedRun = Annotated[str, typer.Argument(help="The name of a launched run, for instance first", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def on_this_machine(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """For options that name what is to be written: an address would become a folder called `s3:`."""
    if value is not None and value.parts and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", value.parts[0]):
        raise InputError(f"--{param.name}: {value.parts[0]}//... is not allowed; give a place on this machine")
    return value


def _version(asked: bool) -> None:
    if asked:
        print(f"coe-dist {metadata.version('coe-dist')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["COE_DIST_DEBUG"] = "1"


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"coe-dist: {warning}", file=sys.stderr)
