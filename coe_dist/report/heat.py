"""Which experts answer which classes: the class x expert table, ordered so that what is alike stands together.

Rows and columns are ordered by hierarchical clustering (average linkage, optimal leaf order: Bar-Joseph, Gifford and
Jaakkola, "Fast optimal leaf ordering for hierarchical clustering", 2001) as scipy has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from coe_dist.report.folder import Details

SHOWN_CLASSES, SHOWN_EXPERTS = 40, 16


def heat_map(details: Details) -> dict[str, Any]:
    """Cut to the classes that lean most on one expert and to the most used experts."""
    selected_CE = np.array(details.selected, dtype=np.int64).reshape(len(details.classes), -1)
    share_CE = selected_CE / np.maximum(1, selected_CE.sum(1, keepdims=True))
    classes, experts = share_CE.shape
    used = np.argsort(-selected_CE.sum(0), kind="stable")[:SHOWN_EXPERTS]
    leaning = np.argsort(-share_CE.max(1, initial=0), kind="stable")[:SHOWN_CLASSES]
    lines, columns = np.sort(leaning), np.sort(used)
    lines = lines[clustered(share_CE[np.ix_(lines, columns)])]
    columns = columns[clustered(share_CE[np.ix_(lines, columns)].T)]
    rows = [
        {
            "name": details.classes[c],
            "images": details.images_per_class[c],
            "cells": [
                {
                    "share": float(share_CE[c, j]),
                    "count": details.selected[c][j],
                    "accuracy": details.correct[c][j] / details.selected[c][j] if details.selected[c][j] else None,
                }
                for j in columns.tolist()
            ],
        }
        for c in lines.tolist()
    ]
    return {"columns": columns.tolist(), "rows": rows, "classes": classes, "experts": experts}


def clustered(rows: npt.NDArray[np.float64]) -> list[int]:
    """An order of the rows in which similar ones are neighbours; fewer than three keep theirs."""
    if len(rows) < 3 or rows.shape[1] == 0:
        return list(range(len(rows)))
    from scipy.cluster.hierarchy import leaves_list, linkage

    return [int(row) for row in leaves_list(linkage(rows, "average", optimal_ordering=True))]
