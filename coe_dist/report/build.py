"""Builds the report: one HTML file with nothing to load, and a script of some lines for its sliders."""

from __future__ import annotations

import base64
import errno
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from coe_dist.errors import InputError
from coe_dist.report.in_use import run_in_use
from coe_dist.report.words import duration, macs, percent
from coe_dist.tracking.store import write_bytes

REPORT, COMPARISON = "report.html", "comparison.html"


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of these run folders and returns its path: report.html in the folder of a single run,
    comparison.html in the first of several.

    What a folder does not hold is left out with a sentence. Raises InputError for a folder that is no run folder, and
    for a place that cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from coe_dist.report.comparison import comparison
    from coe_dist.report.section import section

    runs = [run_in_use(folder) for folder in run_dirs]
    if not runs:
        raise ValueError("run_dirs: empty; give at least one run folder")
    target = Path(out) if out is not None else runs[0].folder / (REPORT if len(runs) == 1 else COMPARISON)
    if target.is_dir():
        raise InputError(f"--out: {target} is a folder; give a file, for instance {target / REPORT}")
    templates = Path(__file__).parent / "page"
    environment = Environment(
        loader=FileSystemLoader(templates), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "macs": macs, "duration": duration}
    script = (templates / "page.js").read_text(encoding="utf-8").strip()
    compared = comparison(runs) if len(runs) > 1 else None
    page = environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=[section(run, f"r{number}", Markup) for number, run in enumerate(runs)],
        comparison=compared,
        curves=Markup(compared["curves"]) if compared else "",
        style=Markup((templates / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # the browser refuses every other script, and everything from elsewhere
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, page.encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # no fault of the place
        raise InputError(f"--out: {target} cannot be written ({error.strerror})") from error
    return target
