"""The self-contained HTML report of one or more run folders, and the model card of one.

folder.py      reads a run folder; what is missing or unreadable is left out and named
in_use.py      the same with the figures of the exit threshold in use
quality.py     selection, confusion and calibration from the rows of single images
heat.py        which experts answer which classes, similar ones side by side
galleries.py   images of the data set: what experts are chosen for, what they get wrong, what exits early
figure.py      matplotlib figures as inline SVG that takes its colours from the page
plots.py       the figures
section.py     what the page says of one run
comparison.py  what it says of several
build.py       turns folders into the page, whose templates, style and script are in page/
card.py        model-card.md
"""

from coe_dist.report.build import write_report

__all__ = ["write_report"]
