"""The fenced blocks, commands and links of the project's Markdown files.

A block's first line is its language and marks: ```sh server. Marks: `elsewhere` (other checks run it), `cluster` (needs
one), `downloads` (weights, from elsewhere), `long` (takes too long here), `server` (its first command goes on until it
is ended), `plugin` and `processes` (see test_documents.py), `file=NAME` (the text is that file).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "cluster/*.md") for path in ROOT.glob(pattern))
MARKS = {"elsewhere", "cluster", "downloads", "long", "server", "plugin", "processes"}


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    language: str
    marks: frozenset[str]
    file: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> list[Block]:
    found, opened, head, lines = [], 0, "", list[str]()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif opened:
            language, *marks = head.split() or [""]
            files = [mark.removeprefix("file=") for mark in marks if mark.startswith("file=")]
            others = frozenset(mark for mark in marks if not mark.startswith("file="))
            found.append(Block(path, opened, language, others, files[0] if files else None, "\n".join(lines) + "\n"))
            opened = 0
        else:
            opened, head, lines = number, line.removeprefix("```"), []
    assert not opened, f"{path}:{opened}: the block does not end"
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block, a line each, without comments; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def table_commands(path: Path) -> list[str]:
    """Commands in the first column of a table: | `coe-dist macs CONFIG` | ... |"""
    return re.findall(r"^\| `([^`]+)`", path.read_text(), flags=re.MULTILINE)


def own_commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words after `coe-dist`) of every command of this project in a shell block or a table."""
    for path in DOCUMENTS:
        where = str(path.relative_to(ROOT))
        lines = [line for block in blocks(path) if block.language == "sh" for line in commands(block.text)]
        for line in [*lines, *table_commands(path)]:
            words = shlex.split(line)
            if words[0] == "coe-dist":
                yield f"{where}: {line}", words[1:]


def links(path: Path) -> list[str]:
    """Relative links and images."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    return [link for link in found if not re.match(r"[a-z]+:", link)]
