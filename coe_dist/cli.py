"""`coe-dist`: one thin command per user job. Each parses, calls one function, prints."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from coe_dist.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    InputError,
    Preempted,
    TrainingError,
)

app = typer.Typer(
    name="coe-dist",
    help="Train and use a Collaboration of Experts: a delegator answers an image itself or picks one of E experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(no_args_is_help=True, help="Write, check and look at data sets.")
app.add_typer(data_app, name="data")
export_app = typer.Typer(no_args_is_help=True, help="Turn a run into something that needs no run.")
app.add_typer(export_app, name="export")

ConfigPath = Annotated[
    Path, typer.Argument(help="A YAML file, for instance configs/fashion_mnist.yaml", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as training.epochs=3 experts.count=8", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(help="A run folder, for instance runs/demo", show_default=False)]
WeightsOption = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(help="The moving averages of the weights, or the last step's; by default averages if there are some."),
]
CheckpointOption = Annotated[
    str, typer.Option(help="Which save: latest, best (on validation), or a number of optimizer steps.")
]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    if debug:
        os.environ["COE_DIST_DEBUG"] = "1"


@app.command(epilog="Example: coe-dist train configs/fashion_mnist.yaml training.epochs=3 name=short")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; without it a local Ray is started.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Delete an existing run of this name instead of resuming it.")
    ] = False,
) -> None:
    """Train a collaboration; an existing run of the same name is resumed."""
    from coe_dist.config import load_config
    from coe_dist.orchestration.display import show_evaluation
    from coe_dist.orchestration.runs import train as run

    run_dir = run(load_config(config, overrides or ()), address=address, overwrite=overwrite)
    show_evaluation(json.loads((run_dir / "evaluation-test.json").read_text()), run_dir)


@app.command(epilog="Example: coe-dist plan configs/images.yaml --gpus 64 --gpu h100 --network 25GB/s")
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Workers, one per GPU; by default CONFIG's.")] = None,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100, v100, l4, rtx3090 or cpu; measure: this machine, in some seconds.")
    ] = "measure",
    network: Annotated[
        str | None, typer.Option(help="Of one worker between machines, each way: 25GB/s or 200Gbit/s.")
    ] = None,
    gpus_per_machine: Annotated[int | None, typer.Option(help="By default the usual number of the device.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, bytes, time per step and cost of a run on any number of workers, before it starts."""
    from coe_dist.bench.planning import plan_run
    from coe_dist.config import load_config
    from coe_dist.planner.display import show_plan

    settings = load_config(config, overrides or ())
    result = plan_run(settings, gpus=gpus, gpu=gpu, network=network, gpus_per_machine=gpus_per_machine)
    print(json.dumps(result)) if as_json else show_plan(result)


@app.command(epilog="Example: coe-dist demo configs/fashion_mnist.yaml")
def demo(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Start anew.")] = False,
) -> None:
    """Train a collaboration and two single networks on real data, and compare them."""
    from coe_dist.config import load_config
    from coe_dist.orchestration.demo import run_demo
    from coe_dist.orchestration.display import show_summary

    settings = load_config(config, overrides or ())
    show_summary(run_demo(settings, overwrite=overwrite), settings.run_dir)


@app.command(epilog="Example: coe-dist evaluate runs/demo --macs-budget 15000 --json")
def evaluate(
    run: RunPath,
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

    result = compute(
        run,
        split=split,
        macs_budget=macs_budget,
        threshold=threshold,
        checkpoint=checkpoint,
        weights=weights,
        address=address,
    )
    print(json.dumps(result)) if as_json else show_evaluation(result, run)


@app.command(epilog="Example: coe-dist calibrate runs/demo --min-accuracy 0.85")
def calibrate(
    run: RunPath,
    macs_budget: Annotated[float | None, typer.Option(help="Average MACs per image to stay within.")] = None,
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

    result = compute(
        run,
        macs_budget=macs_budget,
        min_accuracy=min_accuracy,
        checkpoint=checkpoint,
        weights=weights,
        address=address,
    )
    print(json.dumps(result)) if as_json else show_calibration(result, run)


@app.command(epilog="Example: coe-dist predict runs/demo photos 'more/*.jpg' --csv answers.csv --top 5")
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of exported weights", show_default=False)],
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders (all below them) and patterns", show_default=False)
    ],
    csv: Annotated[Path | None, typer.Option(help="Write the predictions here instead of showing a table.")] = None,
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

    result = compute(
        run,
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


@app.command(epilog="Example: coe-dist scale runs/demo --experts 8 --split most-loaded --out runs/demo8")
def scale(
    run: RunPath,
    experts: Annotated[int, typer.Option(help="How many experts the new run has, more or fewer than RUN.")],
    out: Annotated[Path, typer.Option(help="The new run's folder, for instance runs/demo8")],
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
    from coe_dist.training.scaling import scale as run_scale
    from coe_dist.training.scaling import show_scaled

    if split and from_expert:
        raise InputError(f"--split: {split} is not allowed; --from-expert is given too, give only one of them")
    show_scaled(run_scale(run, experts=experts, out=out, named=from_expert or (), noise=noise))


@app.command(epilog="Example: coe-dist macs configs/images.yaml experts.count=16 --json")
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


@app.command(epilog="Example: coe-dist inspect runs/demo --json")
def inspect(run: RunPath, checkpoint: CheckpointOption = "latest", as_json: AsJson = False) -> None:
    """Show what a checkpoint of a run holds, and whether every file verifies."""
    from coe_dist.training.inspection import inspect_run, show_inspection

    result = inspect_run(run, checkpoint)
    print(json.dumps(result)) if as_json else show_inspection(result)


@export_app.command("weights", epilog="Example: coe-dist export weights runs/demo --out demo-weights")
def export_weights(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The new folder for config.json and the weights.")],
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
) -> None:
    """Write a folder for coe_dist.inference.CollaborationOfExperts.from_pretrained."""
    from coe_dist.training.export import export_weights as write

    _warn(write(run, out, weights, checkpoint))
    print(out)


@export_app.command("mlflow", epilog="Example: coe-dist export mlflow runs/demo --register demo")
def export_mlflow(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="A new folder to save the model in.")] = None,
    register: Annotated[str | None, typer.Option(help="Name of a registered model that gets a new version.")] = None,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
) -> None:
    """Make an MLflow model: in the run's own MLflow run, in a folder, or both."""
    from coe_dist.exports.mlflow_model import export_mlflow as export

    exported = export(run, out=out, register=register, weights=weights, checkpoint=checkpoint)
    _warn(exported.warnings)
    print(*exported.places, sep="\n")


@export_app.command("onnx", epilog="Example: coe-dist export onnx runs/demo --out demo-onnx")
def export_onnx(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The new folder for the ONNX files and manifest.json.")],
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = None,
) -> None:
    """Write one ONNX file for the delegator and one for each expert."""
    from coe_dist.exports.onnx_graphs import export_onnx as export

    _warn(export(run, out, weights, checkpoint))
    print(out)


@data_app.command(
    "write",
    epilog="""Example: coe-dist data write --source imagefolder --root ~/imagenet --out data/imagenet
--max-resolution 500 --jpeg-fraction 0.5\n\n
One file: coe-dist data write --source imagefolder ~/imagenet/train --out data/imagenet/train.beton\n\n
A flat folder: coe-dist data write --source imagefolder ~/imagenet/val --out data/imagenet/validation.beton
--labels LOC_val_solution.csv""",
)
def data_write(
    out: Annotated[
        Path,
        typer.Option(help="Folder for train.beton, validation.beton and test.beton; with FOLDER one .beton file."),
    ],
    folder: Annotated[
        Path | None, typer.Argument(help="Write one file from this folder of CLASS/images.", show_default=False)
    ] = None,
    source: Annotated[str, typer.Option(help="fashion-mnist or imagefolder")] = "fashion-mnist",
    root: Annotated[
        Path | None, typer.Option(help="Holds train/CLASS/*, val/CLASS/*; fashion-mnist is found by itself.")
    ] = None,
    max_resolution: Annotated[int | None, typer.Option(help="Shrink images whose longer side has more pixels.")] = None,
    jpeg_fraction: Annotated[float, typer.Option(help="Fraction of images stored as JPEG, the rest raw.")] = 0.0,
    jpeg_quality: Annotated[int, typer.Option(help="Quality of those JPEGs, 1 to 100.")] = 90,
    labels: Annotated[
        Path | None,
        typer.Option(help="Classes of val's images where they lie in one folder: CSV file,class or ILSVRC's numbers."),
    ] = None,
    synsets: Annotated[
        Path | None, typer.Option(help="With numbers as labels: the class of each (meta.mat, or one class a line).")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With FOLDER: train, validation or test, if the name of --out does not tell.")
    ] = None,
    train_file: Annotated[
        Path | None,
        typer.Option(help="With FOLDER: the file that gives the classes (else train.beton beside it)."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one for each usable core.")] = None,
    max_bad: Annotated[int | None, typer.Option(help="Fail when more images than this are unreadable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images of each split.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Write again what is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a data set into FFCV files, which training reads. What is already complete is kept."""
    from coe_dist.data.beton import write
    from coe_dist.data.written import show_written

    report = write(
        source,
        out,
        folder=folder,
        root=root,
        split=split,
        train_file=train_file,
        max_resolution=max_resolution,
        jpeg_fraction=jpeg_fraction,
        jpeg_quality=jpeg_quality,
        labels=labels,
        synsets=synsets,
        workers=workers,
        max_bad=max_bad,
        limit=limit,
        overwrite=overwrite,
        progress=not as_json,
    )
    print(json.dumps(report)) if as_json else show_written(report)


@data_app.command("verify", epilog="Example: coe-dist data verify data/imagenet/train.beton")
def data_verify(
    file: Annotated[Path, typer.Argument(help="A .beton file", show_default=False)],
    workers: Annotated[int, typer.Option(help="Threads")] = 1,
    as_json: AsJson = False,
) -> None:
    """Decode every image of a file and name the damaged ones; exit code 1 if there are any."""
    from coe_dist.data.verify import show_verified, verify

    result = verify(file, workers=workers, progress=not as_json)
    print(json.dumps(result)) if as_json else show_verified(result)
    if not result["whole"]:
        raise typer.Exit(EXIT_FAILED)


@data_app.command("show", epilog="Example: coe-dist data show data/imagenet/train.beton --n 32 --out grid.png")
def data_show(
    file: Annotated[Path, typer.Argument(help="A .beton file", show_default=False)],
    out: Annotated[Path, typer.Option(help="The picture to write")],
    n: Annotated[int, typer.Option("--n", help="How many images, from the first on.")] = 32,
    overwrite: Annotated[bool, typer.Option(help="Replace the picture.")] = False,
) -> None:
    """Write a picture of the first images of a file with their classes."""
    from coe_dist.data.contact_sheet import write_contact_sheet

    print(write_contact_sheet(file, out, count=n, overwrite=overwrite))


@app.command(epilog="Example: coe-dist report runs/demo")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders", show_default=False)], out: Path | None = None
) -> None:
    """Write a self-contained HTML report of one or more runs."""
    from coe_dist.report.build import write_report

    print(write_report(runs, out))


@app.command(epilog="Example: coe-dist ui runs/demo")
def ui(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder that holds the runs")] = Path("runs"),
    port: int = 5000,
) -> None:
    """Open MLflow's own page on the recorded runs (http://127.0.0.1:5000, Ctrl-C ends it)."""
    from coe_dist.orchestration.ui import serve

    raise typer.Exit(serve(run, port))


@app.command(epilog="Example: coe-dist doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Check versions, cores, memory and GPUs, and whether FFCV, DeepSpeed, Ray and MLflow really work here."""
    from rich.console import Console

    from coe_dist.orchestration.doctor import collect, diagnose

    if as_json:
        print(json.dumps(collect(), default=str))
    else:
        raise typer.Exit(diagnose(Console()))


@app.command(epilog="Example: coe-dist bench router --json")
def bench(
    name: Annotated[str, typer.Argument(help="router, exchange, step, pwlu, inference, loader or plan")],
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option(help="Only the smallest case, to see that it works.")] = False,
) -> None:
    """Measure a part of the system against its peer in the same run."""
    from coe_dist.bench.run import run_bench, show

    record = run_bench(name, quick=quick)
    print(json.dumps(record)) if as_json else show(record)


@app.command(epilog="Example: coe-dist study frontier --max-minutes 30")
def study(
    name: Annotated[str, typer.Argument(help="frontier, ablations, or a study's YAML file", show_default=False)],
    only: Annotated[str | None, typer.Option(help="A pattern such as 'coe-e4/*': the points to train.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2; by default the study's.")] = None,
    max_runs: Annotated[int | None, typer.Option(help="Train at most so many; 0 makes the tables alone.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Begin no training that would end later.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Train a random finished point of each curve again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is left and how long it takes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the trainings of a study that are left; write its table and plot. Finished ones are kept in a CSV file."""
    from coe_dist.study.command import Limits, run_study
    from coe_dist.study.display import parse_seeds, say_to_stderr, show_study

    result = run_study(
        name,
        only=only,
        seeds=parse_seeds(seeds),
        limits=Limits(max_runs, max_minutes),
        verify=verify,
        dry_run=dry_run,
        say=say_to_stderr,
    )
    print(json.dumps(result)) if as_json else show_study(result)
    if not all(answer["verified"] for answer in result["verify"]):
        raise typer.Exit(EXIT_FAILED)


def main() -> None:
    """Maps errors to one line and exit codes: 2 bad input, 1 failed, 75 stopped and resumable, 130 interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        _fail(str(error), EXIT_BAD_INPUT)
    except TrainingError as error:
        _fail(str(error), EXIT_FAILED)
    except Preempted as error:
        _fail(str(error), EXIT_PREEMPTED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"{error.filename or 'a file'} could not be written: {error.strerror}", EXIT_FAILED)
        if hasattr(error, "format_message"):  # the command line itself was wrong
            _fail(error.format_message(), EXIT_BAD_INPUT)
        raise


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"coe-dist: {warning}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    if os.environ.get("COE_DIST_DEBUG"):
        raise
    if message:  # a bare `coe-dist` has printed its help already
        print(f"coe-dist: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
