"""The report of a real run in a real browser: its slider, its widths, its words for who cannot see it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trained_run import real_run

from coe_dist.report import write_report

PHONE, DESKTOP = (390, 844), (1280, 900)
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"no browser; `cluster/setup.sh dev` installs {BROWSERS[0]}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run twice, so that the comparison is there too."""
    run = real_run(tmp_path_factory.getbasetemp())
    return write_report([run, run], tmp_path_factory.mktemp("report") / "page.html")


def opened(browser: Any, page_file: Path, size: tuple[int, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and what the browser complains of (also what the page's own rules made it refuse)."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    page.goto(page_file.as_uri())
    return page, said


def test_the_slider_moves_by_keyboard_and_goes_back(browser: Any, page_file: Path) -> None:
    page, said = opened(browser, page_file, DESKTOP)
    box = page.locator(".explore").first
    slider, words = box.locator("input"), box.locator("output")
    mark = page.locator("#r0-mark")
    before, place = words.inner_text(), mark.get_attribute("transform")
    assert "(in use)" in before
    slider.focus()
    page.keyboard.press("Home")
    first = words.inner_text()
    assert first != before
    assert "100.0% answered early" in first
    assert slider.get_attribute("aria-valuetext") == first
    assert mark.get_attribute("transform") != place
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the button
    assert (words.inner_text(), mark.get_attribute("transform")) == (before, place)
    other = page.locator(".explore").nth(1).locator("output").inner_text()
    assert "(in use)" in other  # the other run's slider stayed
    curve = page.locator("#r0-curve-line2d_1, #r0-mark").last.bounding_box()
    figure = page.locator("figure svg").nth(1).bounding_box()
    assert curve is not None
    assert figure is not None
    assert figure["x"] < curve["x"] < figure["x"] + figure["width"]
    assert said == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_overflows_and_every_colour_can_be_read(browser: Any, page_file: Path, size: tuple[int, int]) -> None:
    for scheme in ("light", "dark"):
        page, said = opened(browser, page_file, size, scheme)
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        width, wide = page.evaluate("""() => [document.documentElement.scrollWidth,
            [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, pre, svg') &&
                e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))]""")
        assert wide == []
        assert width <= size[0]
        ink, paper = page.evaluate("""() => ['color', 'backgroundColor'].map(
            (name) => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).map(Number))""")
        assert contrast(ink, paper) > 7
        assert (sum(paper) < 200) == (scheme == "dark")
        assert said == []


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG's contrast ratio of two sRGB colours."""

    def light(colour: list[int]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_all_has_words_for_a_screen_reader(browser: Any, page_file: Path) -> None:
    page, _ = opened(browser, page_file, PHONE)
    nameless = page.evaluate("""() => [
        ...[...document.querySelectorAll('img')].filter((e) => !e.alt),
        ...[...document.querySelectorAll('figure, [role=img], [role=region], nav')].filter(
            (e) => !e.getAttribute('aria-label')),
        ...[...document.querySelectorAll('input')].filter((e) => !e.labels.length),
        ...[...document.querySelectorAll('figure')].filter((e) => !e.querySelector('figcaption')),
        ...[...document.querySelectorAll('th')].filter((e) => !e.scope),
    ].map((e) => e.outerHTML.slice(0, 90))""")
    assert nameless == []
    assert page.locator("img").count() > 0
    widths = page.evaluate("""async () => { const all = [...document.querySelectorAll('img')];
        all.forEach((e) => (e.loading = 'eager')); await Promise.all(all.map((e) => e.decode()));
        return all.map((e) => e.naturalWidth); }""")
    assert set(widths) == {28}  # the pictures of Fashion-MNIST, each of them decodes
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
