"""A report as a reader's browser takes it apart."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "data", "action", "poster", "srcset"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(page: Page) -> None:
    """What holds for every report."""
    links = {reference for reference in page.references if not reference.startswith("data:image/")}
    assert all(reference.startswith("#") for reference in links)
    assert {reference[1:] for reference in links} <= set(page.ids)
    assert page.source.count("<script>") == page.source.count("<script") == 1
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://(?!\*\*\*@)", page.source)
    assert "@import" not in page.source
    assert not {"link", "iframe", "object"} & page.tags
    assert "#0a0b" not in page.source  # every placeholder colour became a variable
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
