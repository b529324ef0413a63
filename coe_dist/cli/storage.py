"""`coe-dist storage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coe_dist.cli.app import on_this_machine, storage_app


@storage_app.command("push", epilog="Example: coe-dist storage push runs/demo s3://bucket/runs/demo")
def storage_push(
    run: Annotated[Path, typer.Argument(help="A run folder, for instance runs/demo", show_default=False)],
    url: Annotated[
        str | None, typer.Argument(help="The run's own address; by default as storage.url says.", show_default=False)
    ] = None,
) -> None:
    """Bring a run's copy in a store up to date; what is there already is not sent again."""
    from coe_dist.orchestration.mirroring import push_run

    print(push_run(run, url))


@storage_app.command("pull", epilog="Example: coe-dist storage pull s3://bucket/runs/demo")
def storage_pull(
    url: Annotated[str, typer.Argument(help="Such as s3://bucket/runs/demo", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(callback=on_this_machine, help="The new run folder; by default runs/NAME.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run folder that is there.")] = False,
) -> None:
    """Bring a run here, with its newest save and its best one; `coe-dist train` goes on with it."""
    from coe_dist.orchestration.mirroring import pull_run

    print(pull_run(url, out, overwrite=overwrite))
