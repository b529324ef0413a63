"""Names and reasons as text that a terminal, a log or a list of one line an entry can hold."""

from __future__ import annotations

from pathlib import Path


def printable(name: Path | str) -> str:
    """One line of UTF-8: line ends, tabs and other control characters, which a terminal would obey, are escaped, and
    so are bytes of a file name that are no text (as \\xff), which a stream would refuse."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in str(name))


def _escaped(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # Python's own mark of such a byte
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()
