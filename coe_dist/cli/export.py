"""`coe-dist export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coe_dist.cli.app import CheckpointOption, RunPlace, WeightsOption, export_app, on_this_machine, warn


@export_app.command("weights", epilog="Example: coe-dist export weights runs/demo --out demo-weights")
def export_weights(
    run: RunPlace,
    out: Annotated[
        Path, typer.Option(callback=on_this_machine, help="The new folder for config.json and the weights.")
    ],
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
) -> None:
    """Write a folder for coe_dist.inference.CollaborationOfExperts.from_pretrained."""
    from coe_dist.storage.pulling import local_run
    from coe_dist.training.export import export_weights as write

    warn(write(local_run(run, "latest", checkpoint), out, weights, checkpoint))
    print(out)


@export_app.command("mlflow", epilog="Example: coe-dist export mlflow runs/demo --register demo")
def export_mlflow(
    run: RunPlace,
    out: Annotated[
        Path | None, typer.Option(callback=on_this_machine, help="A new folder to save the model in.")
    ] = None,
    register: Annotated[str | None, typer.Option(help="Name of a registered model that gets a new version.")] = None,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
) -> None:
    """Make an MLflow model: in the run's own MLflow run, in a folder, or both."""
    from coe_dist.exports.mlflow_model import export_mlflow as export
    from coe_dist.storage.pulling import local_run

    exported = export(
        local_run(run, "latest", checkpoint), out=out, register=register, weights=weights, checkpoint=checkpoint
    )
    warn(exported.warnings)
    print(*exported.places, sep="\n")


@export_app.command("onnx", epilog="Example: coe-dist export onnx runs/demo --out demo-onnx")
def export_onnx(
    run: RunPlace,
    out: Annotated[
        Path, typer.Option(callback=on_this_machine, help="The new folder for the ONNX files and manifest.json.")
    ],
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
) -> None:
    """Write one ONNX file for the delegator and one for each expert."""
    from coe_dist.exports.onnx_graphs import export_onnx as export
    from coe_dist.storage.pulling import local_run

    warn(export(local_run(run, "latest", checkpoint), out, weights, checkpoint))
    print(out)
