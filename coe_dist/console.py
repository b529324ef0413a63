"""Where tables are printed."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

_WITHOUT_TERMINAL = 160  # characters


def table_console(**options: Any) -> Console:
    """Standard output (or what `options`, rich's, say). A file or a pipe has no width, for which rich takes 80 and cuts
    figures; ours is wide enough for every table. COLUMNS decides where it is set."""
    console = Console(**options)
    if not console.is_terminal and "COLUMNS" not in os.environ and "width" not in options:
        console.width = _WITHOUT_TERMINAL
    return console
