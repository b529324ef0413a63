"""The self-contained HTML report of one or more run folders.

folder.py   reads a run folder; what is missing or unreadable is left out and named
plots.py    figures as inline SVG that takes its colours from the page
build.py    turns folders into the page; page.html is its template
"""

from coe_dist.report.build import write_report

__all__ = ["write_report"]
