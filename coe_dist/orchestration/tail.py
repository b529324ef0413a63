"""Following a file that another process appends to."""

from __future__ import annotations

from pathlib import Path


class FileTail:
    """Gives the complete lines that were appended since the tail was made, or with `from_start` all that are there.

    The file may not exist yet; a line without its newline waits until the rest is there; a file that became shorter was
    written anew and is read from its start.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._pending = b""
        self._position = 0 if from_start else self._size()

    def new_lines(self) -> list[str]:
        size = self._size()
        if size < self._position:
            self._position, self._pending = 0, b""
        if size == self._position:
            return []
        with open(self._path, "rb") as file:
            file.seek(self._position)
            content = file.read(size - self._position)
        self._position += len(content)
        *lines, self._pending = (self._pending + content).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0
