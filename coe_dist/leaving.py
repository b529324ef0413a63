"""How our worker processes end."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave(code: int = 0) -> NoReturn:
    """Ends the process now, when all is written: native threads of the libraries now and then abort one that is torn
    down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
