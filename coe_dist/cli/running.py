"""Commands that train, or say what training would cost, here or on a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from coe_dist.cli.app import TRAIN, AsJson, ConfigPath, Dashboard, LaunchedRun, Overrides, app


@app.command(
    rich_help_panel=TRAIN, epilog="Example: coe-dist train configs/fashion_mnist.yaml training.epochs=3 name=short"
)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; without it a local Ray is started.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Delete an existing run of this name instead of resuming it.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where CONFIG's relative paths lie; by default the current folder.")
    ] = None,
) -> None:
    """Train a collaboration; an existing run of the same name is resumed."""
    from coe_dist.config import load_config
    from coe_dist.orchestration.display import show_evaluation
    from coe_dist.orchestration.places import placed_in
    from coe_dist.orchestration.runs import train as run

    settings = load_config(config, overrides or ())
    run_dir = run(settings if folder is None else placed_in(settings, folder), address=address, overwrite=overwrite)
    show_evaluation(json.loads((run_dir / "evaluation-test.json").read_text()), run_dir)


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: coe-dist launch configs/smoke.yaml --address http://127.0.0.1:8265 --name first",
)
def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Dashboard = None,
    name: Annotated[str | None, typer.Option(help="The run's name, as the override name=... .")] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-wait", help="Show its log and return its exit code.")] = True,
    env: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the job, or KEY for its value here; several times.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(help="Where relative paths lie on the cluster; by default its COE_DIST_FOLDER, else ~/coe_dist."),
    ] = None,
) -> None:
    """Train on a running Ray cluster, as a job that does not need this machine; a run that has ended is resumed."""
    from coe_dist.orchestration.launching import launch as run

    changes = [*(overrides or ()), *([f"name={name}"] if name is not None else ())]
    sys.exit(run(config, changes, address=address, env=env or (), folder=folder, wait=follow))


@app.command(rich_help_panel=TRAIN, epilog="Example: coe-dist jobs --address http://127.0.0.1:8265 --json")
def jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """List what was launched on a Ray cluster."""
    from coe_dist.orchestration.jobs import launched, show_launched

    rows = launched(address)
    print(json.dumps(rows)) if as_json else show_launched(rows)


@app.command(rich_help_panel=TRAIN, epilog="Example: coe-dist logs first --follow --address http://127.0.0.1:8265")
def logs(
    run: LaunchedRun,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="To its end, and return its exit code.")] = False,
) -> None:
    """Show the log of a launched run."""
    from coe_dist.orchestration.launching import show_log

    sys.exit(show_log(run, address=address, to_the_end=follow))


@app.command(rich_help_panel=TRAIN, epilog="Example: coe-dist stop first --address http://127.0.0.1:8265")
def stop(run: LaunchedRun, address: Dashboard = None) -> None:
    """Make a launched run save and end; the same launch resumes it."""
    from coe_dist.orchestration.jobs import stop as end

    print(end(run, address=address))


@app.command(
    rich_help_panel=TRAIN, epilog="Example: coe-dist plan configs/images.yaml --gpus 64 --gpu h100 --network 25GB/s"
)
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


@app.command(rich_help_panel=TRAIN, epilog="Example: coe-dist demo configs/fashion_mnist.yaml")
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


@app.command(rich_help_panel=TRAIN, epilog="Example: coe-dist rehearsal configs/imagenet_coe_large.yaml")
def rehearsal(
    config: ConfigPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the shrunk configuration, such as training.epochs=4", show_default=False),
    ] = None,
    folder: Annotated[Path, typer.Option(help="For images, teacher and configuration.")] = Path("data/rehearsal"),
    classes: Annotated[int, typer.Option(help="Classes of the made images.")] = 1000,
    per_class: Annotated[int, typer.Option(help="Images of each, and one more for the test.")] = 3,
) -> None:
    """Rehearse a long training in minutes: everything on, stopped, resumed, evaluated, checked; exit code 1 if not."""
    from coe_dist.orchestration.rehearsal import rehearse
    from coe_dist.orchestration.rehearsal_checks import show_checks

    show_checks(rehearse(config, overrides or (), folder=folder, classes=classes, per_class=per_class))
