"""Commands that show what was recorded or measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coe_dist.cli.app import SEE, AsJson, RunPlace, app, mlflow_app, on_this_machine
from coe_dist.errors import EXIT_FAILED


@app.command(rich_help_panel=SEE, epilog="Example: coe-dist report runs/demo")
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or addresses of runs", show_default=False)],
    out: Annotated[Path | None, typer.Option(callback=on_this_machine, help="The page to write.")] = None,
) -> None:
    """Write a self-contained HTML report of one or more runs, and each one's model card; MLflow gets them too."""
    from coe_dist.orchestration.reporting import report as write
    from coe_dist.storage.pulling import local_run

    print(write([local_run(run) for run in runs], out))


@app.command(rich_help_panel=SEE, epilog="Example: coe-dist watch runs/demo")
def watch(
    run: RunPlace, once: Annotated[bool, typer.Option("--once", help="Print one picture of the run and end.")] = False
) -> None:
    """Follow a run in the terminal from its folder alone: loads, losses, speed, time left. Ctrl-C ends the watching."""
    from coe_dist.orchestration.watch import watch as follow
    from coe_dist.storage.pulling import local_run

    follow(local_run(run), once=once, again=lambda: local_run(run))


@app.command(rich_help_panel=SEE, epilog="Example: coe-dist ui runs/demo")
def ui(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder that holds the runs")] = Path("runs"),
    port: int = 5000,
) -> None:
    """Open MLflow's own page on the recorded runs (http://127.0.0.1:5000, Ctrl-C ends it)."""
    from coe_dist.orchestration.ui import serve

    raise typer.Exit(serve(run, port))


@mlflow_app.command(epilog="Example: coe-dist mlflow sync runs/demo")
def sync(run: RunPlace) -> None:
    """Send to MLflow what it missed of a run while it did not answer. Nothing is sent twice."""
    from coe_dist.storage.pulling import local_run
    from coe_dist.tracking import sync as send
    from coe_dist.training.run_folder import load_run_config

    folder = local_run(run)
    print(f"{send(folder, load_run_config(folder)):,} values sent")


@app.command(rich_help_panel=SEE, epilog="Example: coe-dist doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Check versions, cores, memory and GPUs, and whether FFCV, DeepSpeed, Ray and MLflow really work here."""
    from coe_dist.console import table_console
    from coe_dist.orchestration.doctor import collect, diagnose

    if as_json:
        print(json.dumps(collect(), default=str))
    else:
        raise typer.Exit(diagnose(table_console()))


@app.command(rich_help_panel=SEE, epilog="Example: coe-dist bench router --json")
def bench(
    name: Annotated[str, typer.Argument(help="router, exchange, step, pwlu, inference, loader or plan")],
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option(help="Only the smallest case, to see that it works.")] = False,
) -> None:
    """Measure a part of the system against its peer in the same run."""
    from coe_dist.bench.run import run_bench, show

    record = run_bench(name, quick=quick)
    print(json.dumps(record)) if as_json else show(record)


@app.command(rich_help_panel=SEE, epilog="Example: coe-dist study frontier --max-minutes 30")
def study(
    name: Annotated[
        str, typer.Argument(help="frontier, ablations, leads, leads-middle, or a study's file", show_default=False)
    ],
    only: Annotated[str | None, typer.Option(help="A pattern such as 'coe-middle/*': the points to train.")] = None,
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
    from coe_dist.study.command import run_study
    from coe_dist.study.display import parse_seeds, say_to_stderr, show_study
    from coe_dist.study.study import Limits

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
