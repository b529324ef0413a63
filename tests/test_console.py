"""Tables in files and pipes are as wide as they need; a study's figures stay whole however narrow the terminal."""

from __future__ import annotations

import re

import pytest

from coe_dist.console import table_console
from coe_dist.study.command import run_study
from coe_dist.study.display import show_study


def test_width_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table_console().width == 160
    assert table_console(width=50).width == 50
    monkeypatch.setenv("COLUMNS", "90")
    assert table_console().width == 90


@pytest.mark.parametrize("columns", [None, 80])
def test_no_figure_of_a_study_is_cut(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    summary = run_study("ablations", dry_run=True, say=lambda line: None)
    show_study(summary)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= (columns or 160)
    assert "…" not in text
    assert ("left out, for the terminal is narrow: oracle" in text) == (columns is not None)
    words = set(re.findall(r"[+-]?\d[\d,.]*", text))
    for point in summary["points"]:
        assert f"{point['curve']}/{point['point']} " in text
        assert f"{point['macs']['mean']:,.0f}" in words
        figure = point["full_test_top1"] or point["full_val_top1"]
        assert f"{100 * figure['mean']:.2f}" in words
