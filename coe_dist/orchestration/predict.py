"""`coe-dist predict`: a model's answers for files, in this process or spread over the workers of a Ray."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coe_dist.errors import InputError
from coe_dist.prediction.files import Broken, list_images
from coe_dist.prediction.table import as_object, check_csv, csv_table
from coe_dist.printable import printable
from coe_dist.resources import usable_cores

if TYPE_CHECKING:  # torch takes seconds, which a refusal should not
    from coe_dist.prediction.answers import Prediction, Row
    from coe_dist.prediction.model import Opened

_MOST_THREADS = 16  # decoding: beyond, they wait for the interpreter's lock


def predict(
    run: str | Path,
    images: Sequence[str],
    *,
    csv: Path | None = None,
    overwrite: bool = False,
    top: int = 1,
    macs_budget: float | None = None,
    threshold: float | None = None,
    checkpoint: str = "latest",
    weights: Literal["ema", "raw"] | None = None,
    workers: int | None = None,
    address: str | None = None,
    batch: int = 256,
    keep_rows: bool = True,
) -> dict[str, Any]:
    """Predicts the class of every image file, lists the files that cannot be read on stderr, and returns the figures.

    run, macs_budget, threshold, checkpoint, weights: see prediction.model.open_model; images: files, folders and
    patterns, see prediction.files; csv: where to write the rows; top: classes named per image; workers: how many
    processes of a Ray (of the cluster at `address`, whose machines must see the files under the same names; else of a
    local one) share the work, none: this process alone; batch: images per batch.

    Keys: run, threshold (null: no early exit), images (answered), exit_rate, average_macs (an integer), top, csv,
    broken ([{file, reason}]), predictions ([{file, class, probability, expert, macs, top: [{class, probability}]}], in
    the order of the listing; only with `keep_rows` or without `csv`). Raises InputError for bad input and when no file
    could be read, TrainingError when a worker fails.
    """
    if not 1 <= batch <= 65_536:
        raise InputError(f"--batch: {batch} is not allowed; give a whole number from 1 to 65536")
    if workers is not None and not 1 <= workers <= 4096:
        raise InputError(f"--workers: {workers} is not allowed; give a whole number from 1 to 4096")
    if address is not None and workers is None:
        raise InputError(f"--address: {address} is not allowed without --workers; give their number too")
    if csv is not None:
        check_csv(csv, overwrite=overwrite)
    listing = list_images(images)

    from coe_dist.prediction.model import open_model

    opened = open_model(
        run, threshold=threshold, macs_budget=macs_budget, top=top, checkpoint=checkpoint, weights=weights
    )
    for warning in opened.warnings:
        print(f"coe-dist: {printable(warning)}", file=sys.stderr)
    if workers is None:
        chunks: Generator[list[Row]] = _in_this_process(opened, listing.files, batch=batch, top=top)
    else:
        from coe_dist.orchestration.predict_workers import predict_on_workers

        chunks = predict_on_workers(opened, listing.files, workers=workers, address=address, batch=batch, top=top)
    broken: list[Broken] = []
    rows: list[dict[str, Any]] = []
    answered = early = macs = 0
    with closing(chunks), csv_table(csv, top) as table, _progress(len(listing.files)) as bar:
        for problem in listing.unreadable:
            bar.tell(problem)
            broken.append(problem)
        for chunk in chunks:
            answers: list[Prediction] = []
            for row in chunk:
                if isinstance(row, Broken):
                    bar.tell(row)
                    broken.append(row)
                else:
                    answers.append(row)
            answered += len(answers)
            early += sum(row.expert is None for row in answers)
            macs += sum(row.macs for row in answers)
            if table is not None:
                table.add(answers)
            if table is None or keep_rows:
                rows += map(as_object, answers)
            bar.advance(len(chunk))
    if not answered:
        raise InputError(
            f"IMAGES: none of {len(broken)} files could be read; the first: {printable(broken[0].file)} "
            f"({printable(broken[0].reason)})"
        )
    return {
        "run": str(run),
        "threshold": opened.model.threshold,
        "images": answered,
        "exit_rate": early / answered,
        "average_macs": round(macs / answered),
        "top": top,
        "csv": None if csv is None else str(csv),
        "broken": [problem._asdict() for problem in broken],
        **({"predictions": rows} if csv is None or keep_rows else {}),
    }


def _in_this_process(opened: Opened, files: Sequence[str], *, batch: int, top: int) -> Generator[list[Row]]:
    import torch

    from coe_dist.prediction.answers import predict_files

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = min(usable_cores(), _MOST_THREADS)
    yield from predict_files(opened.model, files, batch=batch, top=top, threads=threads, device=device)


class _Bar:
    """Progress and bad files, both on stderr; stdout is the result's."""

    def __init__(self, progress: Any, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("images", total=total)

    def advance(self, files: int) -> None:
        self._progress.advance(self._task, files)

    def tell(self, broken: Broken) -> None:
        line = f"coe-dist: {printable(broken.file)}: cannot be read ({printable(broken.reason)})"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(total: int) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress, total)
