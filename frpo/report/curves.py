"""Figures of downstream fine-tuning as it goes on: by step, and by how far it has moved."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frpo.report.compare import Estimate, estimate
from frpo.report.measurements import Measurements, number
from frpo.report.style import Picture, Styles, curve, featured, legend, panels, png, unit_axis

ROW = 3
BY_STEP = (
    ("safety", "Safety", "safety"),
    ("helpfulness", "Helpfulness", "helpfulness"),
    ("tasks", "Task score", "task"),
)


def retention(m: Measurements, styles: Styles, primary: str | None) -> Iterator[Picture]:
    """A figure each for safety, helpfulness and task score against downstream steps: a panel per downstream run."""
    for role, title, name in BY_STEP:
        measure = role if role == "tasks" else m.roles.get(role)
        table = with_start(m, measure)
        if table.empty:
            continue
        shown = featured(m, primary, table.index.get_level_values("method"))
        figure, axes = _by_condition(m, table)
        drawn: list[Estimate] = []
        for condition, ax in axes.items():
            steps = [int(s) for s in table[condition].columns]
            for method in shown:
                ys = _intervals(table, method, condition)
                drawn += ys
                band = method in (m.baseline, primary)
                curve(ax, [float(s) for s in steps], ys, styles[method], method, band=band)
            _step_axis(ax, steps)
            ax.set_title(condition)
        _label(figure, axes, "downstream steps", title.lower())
        unit_axis(axes.values(), [y.mean for y in drawn])
        legend(figure, axes.values())
        text = f"{title} against downstream steps ({_what(m, role)}). Line: mean over seeds. "
        text += "Band: 95% interval, drawn for the baseline and the headline's method. "
        text += f"Step {m.retained_from} and later count as retained. {_shown(shown, m)}"
        yield Picture(f"{name}_by_step", f"{title} through fine-tuning", text, png(figure))


def by_drift(m: Measurements, styles: Styles, primary: str | None) -> Picture | None:
    """Safety against the sequence KL to the policy before fine-tuning, a panel per downstream run."""
    safety, kl = with_start(m, m.roles.get("safety")), with_start(m, m.roles.get("kl_start"), start=0.0)
    common = safety.columns.intersection(kl.columns) if not (safety.empty or kl.empty) else []
    if not len(common):
        return None
    safety, kl = safety[common], kl[common]
    shown = featured(
        m, primary, set(safety.index.get_level_values("method")) & set(kl.index.get_level_values("method"))
    )
    figure, axes = _by_condition(m, safety)
    for condition, ax in axes.items():
        furthest = 0.0
        for method in shown:
            xs = [x.mean for x in _intervals(kl, method, condition)]
            curve(ax, xs, _intervals(safety, method, condition), styles[method], method, band=False)
            furthest = max([furthest, *(x for x in xs if np.isfinite(x))])
        _drift_axis(ax, furthest)
        ax.set_title(condition)
    _label(figure, axes, "KL to the start, nats per completion", "safety")
    unit_axis(axes.values(), safety.to_numpy().ravel())
    legend(figure, axes.values())
    text = (
        "Safety against how far fine-tuning has moved the policy: exact per-token KL to the policy before it, summed "
    )
    text += "over a completion. Means over seeds, one point per measured step. The KL axis of a panel is "
    text += f"logarithmic above 0.1 where it goes beyond 1. {_shown(shown, m)}"
    return Picture("safety_by_drift", "Safety against drift", text, png(figure))


def with_start(m: Measurements, measure: str | None, start: float | None = None) -> pd.DataFrame:
    """:meth:`Measurements.after` with step 0: as measured, else the trained policy's own value, else ``start``."""
    table = m.after(measure)
    if table.empty:
        return table
    before = m.before(measure)
    for condition in table.columns.get_level_values("condition").unique():
        run = table[condition].notna().any(axis=1)
        if (condition, 0) not in table:
            table[(condition, 0)] = np.nan
        if len(before) and measure != "tasks":
            table[(condition, 0)] = table[(condition, 0)].fillna(before.reindex(table.index).where(run))
        if start is not None:
            table[(condition, 0)] = table[(condition, 0)].fillna(pd.Series(start, index=table.index).where(run))
    return table.sort_index(axis=1).dropna(axis=1, how="all")


def _intervals(table: pd.DataFrame, method: str, condition: str) -> list[Estimate]:
    own = table.xs(method, level="method")[condition]
    return [estimate(own[step]) for step in own.columns]


def _by_condition(m: Measurements, table: pd.DataFrame) -> tuple[Figure, dict[str, Axes]]:
    present = set(table.columns.get_level_values("condition"))
    conditions = [str(name) for name in m.conditions.index if name in present]
    columns = ROW if len(conditions) > 4 else min(len(conditions), 2)
    rows = ceil(len(conditions) / columns)
    figure, grid = panels(rows, columns, height=3.4 + 1.2 / rows)
    for ax in list(grid.ravel())[len(conditions) :]:
        ax.set_visible(False)
    return figure, dict(zip(conditions, grid.ravel(), strict=False))


def _step_axis(ax: Axes, steps: list[int]) -> None:
    positive = [s for s in steps if s > 0]
    if positive:
        ax.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
    ax.set_xticks(steps, labels=[str(s) for s in steps])
    ax.minorticks_off()


def _drift_axis(ax: Axes, furthest: float) -> None:
    """Logarithmic above a tenth of a nat: harmless fine-tuning and one that breaks the policy share a panel."""
    if furthest > 1:
        ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
        ticks = [0.0, *(tick for tick in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0) if tick <= furthest)]
        ax.set_xticks(ticks, labels=[number(tick) for tick in ticks])
        ax.minorticks_off()


def _label(figure: Figure, axes: dict[str, Axes], x: str, y: str) -> None:
    for ax in axes.values():
        spec = ax.get_subplotspec()
        if spec is not None and spec.is_first_col():
            ax.set_ylabel(y)
        ax.set_xlabel(x)


def _what(m: Measurements, role: str) -> str:
    if role == "tasks":
        return "; ".join(f"{task}: {measure}" for task, measure in (m.roles.get("tasks") or {}).items())
    return str(m.roles.get(role))


def _shown(shown: list[str], m: Measurements) -> str:
    return "" if len(shown) == len(m.methods) else f"{len(shown)} of {len(m.methods)} methods; the table has all."
