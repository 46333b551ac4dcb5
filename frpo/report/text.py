"""The report in a few lines, for the terminal."""

from __future__ import annotations

import textwrap

from frpo.report.compare import Estimate
from frpo.report.measurements import measure
from frpo.report.tables import methods_table
from frpo.report.verdict import verdict
from frpo.study.results import StudyResults

WIDTH = 100
COLUMNS = ("reward before", "KL before", "safety before", "safety retained", "vs baseline")
"""What a terminal has room for; the page has the rest."""


def summary(results: StudyResults) -> str:
    """The verdict and one row per method: means over seeds, with half the width of the 95% interval if there is one."""
    m = measure(results)
    table, found = methods_table(m), verdict(m)
    shown = [
        name for name in COLUMNS if name in table.columns and any(cells[name].seeds for cells in table.cells.values())
    ]
    width = max(len(method) for method in table.cells)
    lines = [f"{'':<{width}}" + "".join(f"  {name:>18}" for name in shown)]
    for method, cells in table.cells.items():
        lines.append(f"{method:<{width}}" + "".join(f"  {_cell(cells[name]):>18}" for name in shown))
    meanings = [textwrap.fill(f"{name}: {table.columns[name]}", WIDTH, subsequent_indent="    ") for name in shown]
    told = [textwrap.fill(sentence, WIDTH) for sentence in (found.headline, *found.warnings)]
    return "\n".join(["", *lines, "", *meanings, "", *told])


def _cell(found: Estimate) -> str:
    if not found.seeds:
        return "-"
    return f"{found.mean:.3f} +/- {(found.high - found.low) / 2:.3f}" if found.known else f"{found.mean:.3f}"
