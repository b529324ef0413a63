"""Commands on a trained run: evaluate, calibrate, predict, scale, count, look into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from coe_dist.cli.app import (
    USE,
    Address,
    AsJson,
    CheckpointOption,
    ConfigPath,
    Overrides,
    RunPlace,
    WeightsOption,
    app,
    on_this_machine,
)
from coe_dist.errors import InputError


@app.command(rich_help_panel=USE, epilog="Example: coe-dist evaluate runs/demo --macs-budget 15000 --json")
def evaluate(
    run: RunPlace,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Which images.")] = "test",
    macs_budget: Annotated[
        float | None, typer.Option(help="Average MACs per image; its threshold is calibrated on validation and kept.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Delegator confidence from which images exit early; not kept.")
    ] = None,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run; every image is counted once. Figures of other networks than the newest are shown but not kept."""
    from coe_dist.orchestration.display import show_evaluation
    from coe_dist.orchestration.runs import evaluate as compute
    from coe_dist.storage.pulling import local_run

    folder = local_run(run, "latest", checkpoint)
    result = compute(
        folder,
        split=split,
        macs_budget=macs_budget,
        threshold=threshold,
        checkpoint=checkpoint,
        weights=weights,
        address=address,
    )
    print(json.dumps(result)) if as_json else show_evaluation(result, folder)


@app.command(rich_help_panel=USE, epilog="Example: coe-dist calibrate runs/demo --min-accuracy 0.85")
def calibrate(
    run: RunPlace,
    macs_budget: Annotated[
        float | None,
        typer.Option(help="Average MACs per image to stay within on validation; other images differ by a little."),
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Top-1 on validation (0 to 1) to reach with the fewest average MACs.")
    ] = None,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Choose on validation from which confidence images exit early, and keep it with the run."""
    from coe_dist.orchestration.calibrate import calibrate as compute
    from coe_dist.orchestration.calibrate import show_calibration
    from coe_dist.storage.pulling import local_run

    folder = local_run(run, "latest", checkpoint)
    result = compute(
        folder,
        macs_budget=macs_budget,
        min_accuracy=min_accuracy,
        checkpoint=checkpoint,
        weights=weights,
        address=address,
    )
    print(json.dumps(result)) if as_json else show_calibration(result, folder)


@app.command(
    rich_help_panel=USE,
    epilog="Example: coe-dist predict runs/demo photos 'more/*.jpg' --csv answers.csv --top 5",
)
def predict(
    run: Annotated[
        str, typer.Argument(help="A run folder, its address, or a folder of exported weights", show_default=False)
    ],
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders (all below them) and patterns", show_default=False)
    ],
    csv: Annotated[
        Path | None,
        typer.Option(callback=on_this_machine, help="Write the predictions here instead of showing a table."),
    ] = None,
    top: Annotated[int, typer.Option(help="Name so many classes, the most probable first.")] = 1,
    macs_budget: Annotated[
        float | None, typer.Option(help="Average MACs per image, by the run's curve on validation.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Delegator confidence from which images exit early; by default the run's own.")
    ] = None,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
    workers: Annotated[int | None, typer.Option(help="Spread the files over so many Ray workers.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster, which sees the same files.")] = None,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 256,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing CSV file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict the class of image files; those that cannot be read are listed and skipped."""
    from coe_dist.orchestration.predict import predict as compute
    from coe_dist.prediction.table import show_predictions
    from coe_dist.storage.pulling import local_run

    result = compute(
        local_run(run, "latest", checkpoint),
        images,
        csv=csv,
        overwrite=overwrite,
        top=top,
        macs_budget=macs_budget,
        threshold=threshold,
        checkpoint=checkpoint,
        weights=weights,
        workers=workers,
        address=address,
        batch=batch,
        keep_rows=as_json,
    )
    print(json.dumps(result)) if as_json else show_predictions(result)


@app.command(
    rich_help_panel=USE,
    epilog="Example: coe-dist scale runs/demo --experts 8 --split most-loaded --out runs/demo8",
)
def scale(
    run: RunPlace,
    experts: Annotated[int, typer.Option(help="How many experts the new run has, more or fewer than RUN.")],
    out: Annotated[Path, typer.Option(callback=on_this_machine, help="The new run's folder, for instance runs/demo8")],
    from_expert: Annotated[
        list[int] | None,
        typer.Option(help="Expert to copy, or to keep when there are to be fewer; may be given several times."),
    ] = None,
    split: Annotated[
        Literal["most-loaded"] | None,
        typer.Option(help="Copy the experts chosen most often, or keep those (the default)."),
    ] = None,
    noise: Annotated[float, typer.Option(help="Noise on a copy, relative to the size of its weights.")] = 0.01,
) -> None:
    """Make a run with another number of experts from a trained one; `coe-dist train` goes on with it."""
    from coe_dist.storage.pulling import local_run
    from coe_dist.training.scaling import scale as run_scale
    from coe_dist.training.scaling import show_scaled

    if split and from_expert:
        raise InputError(f"--split: {split} is not allowed; --from-expert is given too, give only one of them")
    show_scaled(run_scale(local_run(run, "latest"), experts=experts, out=out, named=from_expert or (), noise=noise))


@app.command(rich_help_panel=USE, epilog="Example: coe-dist macs configs/images.yaml experts.count=16 --json")
def macs(
    config: ConfigPath,
    overrides: Overrides = None,
    channels: Annotated[int | None, typer.Option(help="1 or 3; by default the data set's, or its source's.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes; by default likewise.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count multiply-adds and parameters of a configuration; its data set need not exist yet."""
    from coe_dist.config import load_config
    from coe_dist.training.macs_table import macs_table, show_macs

    table = macs_table(load_config(config, overrides or ()), channels=channels, classes=classes)
    print(json.dumps(table)) if as_json else show_macs(table)


@app.command(rich_help_panel=USE, epilog="Example: coe-dist inspect runs/demo --json")
def inspect(run: RunPlace, checkpoint: CheckpointOption = "latest", as_json: AsJson = False) -> None:
    """Show what a checkpoint of a run holds, and whether every file verifies."""
    from coe_dist.storage.pulling import local_run
    from coe_dist.training.inspection import inspect_run, show_inspection

    result = inspect_run(local_run(run, "latest", checkpoint), checkpoint)
    print(json.dumps(result)) if as_json else show_inspection(result)
