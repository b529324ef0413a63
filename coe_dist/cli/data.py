"""`coe-dist data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coe_dist.cli.app import AsJson, data_app, on_this_machine
from coe_dist.errors import EXIT_FAILED


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
        typer.Option(
            callback=on_this_machine,
            help="Folder for train.beton, validation.beton and test.beton; with FOLDER one .beton file.",
        ),
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
    file: Annotated[str, typer.Argument(help="A .beton file, or its URL", show_default=False)],
    workers: Annotated[int, typer.Option(help="Threads")] = 1,
    as_json: AsJson = False,
) -> None:
    """Decode every image of a file and name the damaged ones; exit code 1 if there are any."""
    from coe_dist.data.verify import show_verified, verify
    from coe_dist.storage.datasets import local_beton

    result = verify(local_beton(file), workers=workers, progress=not as_json)
    print(json.dumps(result)) if as_json else show_verified(result)
    if not result["whole"]:
        raise typer.Exit(EXIT_FAILED)


@data_app.command("show", epilog="Example: coe-dist data show data/imagenet/train.beton --n 32 --out grid.png")
def data_show(
    file: Annotated[str, typer.Argument(help="A .beton file, or its URL", show_default=False)],
    out: Annotated[Path, typer.Option(callback=on_this_machine, help="The picture to write")],
    n: Annotated[int, typer.Option("--n", help="How many images, from the first on.")] = 32,
    overwrite: Annotated[bool, typer.Option(help="Replace the picture.")] = False,
) -> None:
    """Write a picture of the first images of a file with their classes."""
    from coe_dist.data.contact_sheet import write_contact_sheet
    from coe_dist.storage.datasets import local_beton

    print(write_contact_sheet(local_beton(file), out, count=n, overwrite=overwrite))


@data_app.command("staged", epilog="Example: coe-dist data staged --clean")
def data_staged(
    folder: Annotated[
        Path | None, typer.Option(help="As data.staging.folder; by default $XDG_CACHE_HOME/coe_dist/staged.")
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove all that no process reads.")] = False,
    as_json: AsJson = False,
) -> None:
    """List this machine's copies of .beton files that a store or a shared folder holds."""
    from coe_dist.storage.listing import listed, show_listed

    result = listed(folder, clean=clean)
    print(json.dumps(result)) if as_json else show_listed(result)
