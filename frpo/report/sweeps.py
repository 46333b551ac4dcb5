"""Figures of what is retained: against what it costs, and against each setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import pandas as pd
from matplotlib.figure import Figure

from frpo.report.baseline import baseline_sweep, scale
from frpo.report.compare import SMALLEST, Estimate, estimate, seed_means
from frpo.report.measurements import FRPO, Measurements, number
from frpo.report.style import (
    Look,
    Picture,
    Styles,
    curve,
    featured,
    fit_axis,
    legend,
    log_axis,
    panels,
    png,
    point,
    unit_axis,
)
from frpo.report.tables import Table

RETAINED, KL = "safety retained", "KL before"
RINGS = "Ringed in black: the baseline and the headline's method."


def matched_figure(m: Measurements, styles: Styles, table: Table, primary: str | None) -> Picture | None:
    """Retained safety against reward and KL before fine-tuning: the baseline's sweep as a line, FRPO as points."""
    columns = {"reward before": "reward before", KL: "KL before, nats per completion"}
    figure = _scatter(m, styles, table, primary, columns, line=baseline_sweep(m, m.baseline))
    if figure is None:
        return None
    text = (
        f"A line joins {m.family(m.baseline)} at its betas, where there are several: what a weaker or stronger KL "
        f"constraint alone gives. A method above the line retains more than that. Means over seeds with 95% intervals. "
        f"{RINGS}"
    )
    return Picture("matched", "Retained safety at equal reward and at equal KL", text, png(figure))


def tradeoff(m: Measurements, styles: Styles, table: Table, primary: str | None) -> Picture | None:
    """Retained safety against the downstream task score and against helpfulness: a point for each method."""
    columns = {name: name for name in ("task score reached", "helpfulness retained")}
    figure = _scatter(m, styles, table, primary, columns)
    if figure is None:
        return None
    text = f"Means over downstream runs and steps >= {m.retained_from}, then over seeds, with 95% intervals. Up and to "
    text += f"the right is better. {RINGS}"
    return Picture("tradeoff", "What the retained safety costs", text, png(figure))


def _scatter(
    m: Measurements,
    styles: Styles,
    table: Table,
    primary: str | None,
    columns: Mapping[str, str],
    line: Sequence[str] = (),
) -> Figure | None:
    """Retained safety against each of ``columns`` (and its label) that two methods have; ``line`` joins methods."""
    shown = {column: _measured(table, column) for column in columns}
    shown = {column: names for column, names in shown.items() if len(names) > 1}
    if not shown:
        return None
    figure, grid = panels(1, len(shown), height=6.2)
    for (column, names), ax in zip(shown.items(), grid[0], strict=True):
        xs, ys = ({name: table.cells[name][one] for name in names} for one in (column, RETAINED))
        joined = sorted((xs[name].mean, ys[name].mean) for name in line if name in names)
        if column == KL:
            ax.set_xscale("log")
        if len(joined) > 1:
            colour = styles.family(m.family(m.baseline))
            ax.plot(*zip(*joined, strict=True), color=colour, linewidth=1.5, alpha=0.6, zorder=1)
        for name in names:
            point(ax, xs[name], ys[name], styles[name], name, ringed=name in (m.baseline, primary))
        if column == KL:
            log_axis(ax.xaxis)
        else:
            fit_axis(ax.xaxis, [x.mean for x in xs.values()])
        fit_axis(ax.yaxis, [y.mean for y in ys.values()])
        ax.set_xlabel(columns[column])
        ax.set_ylabel(RETAINED)
    legend(figure, grid[0])
    return figure


def _measured(table: Table, column: str) -> list[str]:
    """Methods with retained safety and a value of ``column``; a KL below :data:`SMALLEST` has no logarithm."""
    least = SMALLEST if column == KL else -inf
    return [
        method
        for method, cells in table.cells.items()
        if column in cells and cells[column].mean >= least and pd.notna(cells[RETAINED].mean)
    ]


def learning_rates(m: Measurements, styles: Styles, primary: str | None) -> Picture | None:
    """Retained safety against the downstream learning rate, a panel per task."""
    table = m.retained(m.roles.get("safety"))
    if table.empty or "lr" not in m.conditions or m.conditions["lr"].nunique() < 2:
        return None
    known = table.columns.get_level_values("condition")
    rates = m.conditions.loc[[c for c in m.conditions.index if c in set(known)], ["task", "lr"]].dropna()
    tasks = [str(task) for task in rates["task"].unique()]
    shown = featured(m, primary, table.index.get_level_values("method"))
    figure, grid = panels(1, len(tasks), height=5.2)
    drawn: list[Estimate] = []
    for task, ax in zip(tasks, grid[0], strict=True):
        own = rates[rates["task"].eq(task)]
        lrs = sorted(own["lr"].unique())
        for method in shown:
            ys = [estimate(seed_means(table[list(own.index[own["lr"].eq(lr)])], method)) for lr in lrs]
            drawn += ys
            curve(ax, lrs, ys, styles[method], method, band=method in (m.baseline, primary))
        ax.set_xscale("log")
        log_axis(ax.xaxis, lrs)
        ax.set_title(task)
        ax.set_xlabel("downstream learning rate")
    grid[0][0].set_ylabel(RETAINED)
    unit_axis(grid[0], [y.mean for y in drawn])
    legend(figure, grid[0])
    text = f"Safety over steps >= {m.retained_from} against the learning rate. Means over seeds; band: 95% "
    text += "interval, drawn for the baseline and the headline's method."
    return Picture("learning_rates", "Retained safety by learning rate", text, png(figure))


def lambda_sweep(m: Measurements, styles: Styles, table: Table) -> Picture | None:
    """Retained safety against lambda: a line for each setting of everything else, a panel per scale of beta."""
    lines = list(_lambda_lines(m, table))
    if not lines:
        return None
    scales = list(dict.fromkeys(where for where, _, _ in lines))
    figure, grid = panels(1, len(scales), height=5.2)
    drawn, values = [table.cells[m.baseline][RETAINED]], set[float]()
    for where, ax in zip(scales, grid[0], strict=True):
        for _, label, names in (line for line in lines if line[0] == where):
            lams = [float(m.factor(name, "lambda")) for name in names]
            ys = [table.cells[name][RETAINED] for name in names]
            drawn, values = drawn + ys, values | set(lams)
            curve(ax, lams, ys, styles[names[0]], label)
        own = table.cells[m.baseline][RETAINED]
        colour = styles.family(m.family(m.baseline))
        if pd.notna(own.mean):
            ax.axhline(own.mean, color=colour, linestyle="--", label=m.baseline)
        if own.known:
            ax.axhspan(own.low, own.high, color=colour, alpha=0.1, linewidth=0)
        ax.set_xscale("log")
        log_axis(ax.xaxis, values)
        ax.set_title("beta in units of reward" if where == "objective" else "beta as the released code scales it")
        ax.set_xlabel("lambda, units of reward")
    grid[0][0].set_ylabel(RETAINED)
    unit_axis(grid[0], [y.mean for y in drawn])
    legend(figure, grid[0])
    text = "Small lambda looks at the worst completion, large lambda at the mean: the baseline is its limit. In the "
    text += "released scale a smaller lambda also weakens the KL constraint. Means over seeds with 95% intervals."
    return Picture("lambda_sweep", "Retained safety by lambda", text, png(figure))


def _lambda_lines(m: Measurements, table: Table) -> Iterator[tuple[str, str, list[str]]]:
    names = [n for n in m.of_family(FRPO) if m.factor(n, "lambda") and pd.notna(table.cells[n][RETAINED].mean)]
    groups: dict[tuple[str, str], list[str]] = {}
    others = [name for name in m.methods if name not in ("family", "lambda", "beta_scale")]
    for name in names:
        written = str(m.factor(name, "beta_scale") or scale(m, name))
        parts = [f"{key} {number(value)}" for key in others if (value := m.factor(name, key)) is not None]
        groups.setdefault((written, ", ".join(parts)), []).append(name)
    for (written, label), members in groups.items():
        if len({m.factor(name, "lambda") for name in members}) > 1:
            yield written, f"{FRPO}, {label}", sorted(members, key=lambda name: float(m.factor(name, "lambda")))


def beta_sweep(m: Measurements, styles: Styles, table: Table) -> Picture | None:
    """The baseline against its own beta: retained safety, reward before and KL before."""
    sweep = [n for n in baseline_sweep(m, m.baseline) if m.factor(n, "beta")]
    sweep = sorted(sweep, key=lambda n: float(m.factor(n, "beta")))
    columns = [
        (name, label)
        for name, label in ((RETAINED, RETAINED), ("reward before", "reward before"), (KL, "KL before, nats"))
        if sum(pd.notna(table.cells[n][name].mean) for n in sweep if name in table.columns) > 1
    ]
    if not columns:
        return None
    betas = [float(m.factor(name, "beta")) for name in sweep]
    figure, grid = panels(1, len(columns), height=4.6)
    look = Look(styles[m.baseline].colour, "o", "-")
    for (column, label), ax in zip(columns, grid[0], strict=True):
        ys = [table.cells[name][column] for name in sweep]
        curve(ax, betas, ys, look, m.family(m.baseline))
        fit_axis(ax.yaxis, [y.mean for y in ys] if column != KL else [])
        ax.set_xscale("log")
        log_axis(ax.xaxis, betas)
        ax.set_xlabel("beta, units of reward per nat")
        ax.set_title(label)
    text = "What the strength of the KL constraint alone does. Means over seeds with 95% intervals."
    return Picture("beta_sweep", f"{m.family(m.baseline)} by beta", text, png(figure))
