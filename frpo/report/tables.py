"""The tables of the report: one row per method, cells with intervals, and what the study has not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from frpo.report.compare import Estimate, estimate, paired, seed_means
from frpo.report.measurements import BASE, JUDGED_ROLES, SINGLE_ROLES, Measurements


@dataclass(frozen=True)
class Table:
    """``cells[method][column]`` is an interval over seeds; ``columns`` maps a column to what it shows."""

    columns: dict[str, str]
    cells: dict[str, dict[str, Estimate]]

    def long(self) -> pd.DataFrame:
        """One row per method and column."""
        rows = [
            {"method": method, "column": name, "mean": i.mean, "low": i.low, "high": i.high, "seeds": i.seeds}
            for method, cells in self.cells.items()
            for name, i in cells.items()
        ]
        return pd.DataFrame(rows, columns=["method", "column", "mean", "low", "high", "seeds"])


def methods_table(m: Measurements) -> Table:
    """Every method before and after fine-tuning, and its difference to the baseline at the same seeds."""
    columns = dict(_columns(m))
    cells = {
        method: {name: estimate(values(method)) for name, (_, values) in columns.items()} for method in m.methods.index
    }
    return Table({name: text for name, (text, _) in columns.items()}, cells)


Values = Callable[[str], pd.Series]


def _columns(m: Measurements) -> Iterator[tuple[str, tuple[str, Values]]]:
    kept = f"mean over downstream runs and steps >= {m.retained_from}"
    for name, role in (
        ("reward before", "reward"),
        ("safety before", "safety"),
        ("helpfulness before", "helpfulness"),
        ("KL before", "kl_reference"),
    ):
        unit = ", nats per completion to the reference" if role == "kl_reference" else ""
        if m.roles.get(role):
            yield name, (f"{m.roles[role]} of the trained policy{unit}", _before(m, str(m.roles[role])))
    safety = m.retained(m.roles.get("safety"))
    yield "safety retained", (f"{m.roles.get('safety')}, {kept}", lambda method: seed_means(safety, method))
    yield (
        "vs baseline",
        (
            f"safety retained minus that of {m.baseline} at the same seed, over what both have; seeds that lack some "
            "of it are left out",
            lambda method: pd.Series(dtype=float) if method == m.baseline else paired(safety, method, m.baseline),
        ),
    )
    for suite, measure in m.safety_suites.items():
        yield f"safety retained, {suite}", (f"{measure}, {kept}", _retained(m, measure))
    if m.roles.get("helpfulness"):
        yield "helpfulness retained", (f"{m.roles['helpfulness']}, {kept}", _retained(m, str(m.roles["helpfulness"])))
    yield "task score reached", (f"each task's own score, {kept}", _retained(m, "tasks"))


def _before(m: Measurements, measure: str) -> Values:
    values = m.before(measure)

    def of(method: str) -> pd.Series:
        known = len(values) and method in values.index.get_level_values("method")
        return values.xs(method, level="method") if known else pd.Series(dtype=float)

    return of


def _retained(m: Measurements, measure: str) -> Values:
    table = m.retained(measure)
    return lambda method: seed_means(table, method)


def failures(m: Measurements) -> pd.DataFrame:
    """Failed judgements of each method: ``completions`` judged (once per quantity), ``failed`` and ``share``."""
    rows = [m.rows(role if role == "tasks" else m.roles.get(role)) for role in JUDGED_ROLES]
    rows += [m.rows(measure) for measure in m.safety_suites.values()]
    judged = pd.concat(rows)
    judged = judged[~judged.index.duplicated()]
    table = judged.groupby("method")[["completions", "failed"]].sum().reindex(m.methods.index, fill_value=0)
    share = table["failed"] / table["completions"].where(table["completions"] > 0)
    return table.assign(share=share.fillna(0.0))


def missing(m: Measurements) -> list[str]:
    """What the measurements lack, in sentences; the runs that are not done stand in the results."""
    lines = []
    for role in SINGLE_ROLES:
        measure = m.roles.get(role)
        if measure and m.rows(str(measure)).empty:
            lines.append(f"Nothing was measured for the role {role} ({measure}).")
        elif not measure and role != "unseen":
            lines.append(f"The study names no quantity for the role {role}.")
    for task in sorted(set(m.conditions["task"]) - set(m.roles.get("tasks") or {})):
        lines.append(f"The study names no score for the downstream task {task}.")
    return [*lines, *_missing_cells(m)]


def _missing_cells(m: Measurements) -> Iterator[str]:
    seeds = sorted(m.means["seed"].unique())
    if len(seeds) < 2:
        yield "There is one seed: no intervals, and no claim."
    cells = m.means.groupby(["method", "seed"])["condition"].unique()
    for method in m.methods.index:
        own = {seed: set(cells[(method, seed)]) for seed in seeds if (method, seed) in cells.index}
        lacking = [str(seed) for seed in seeds if seed not in own]
        if lacking and m.family(method) != BASE:
            yield f"{method}: no measurements at seed {', '.join(lacking)}."
        if not any(conditions - {""} for conditions in own.values()):
            yield f"{method}: no downstream fine-tuning yet."
            continue
        for seed, conditions in own.items():
            absent = [name for name in m.conditions.index if name not in conditions]
            if absent:
                yield f"{method}, seed {seed}: no downstream run {'; '.join(absent)}."
        yield from _missing_steps(m, method)


def _missing_steps(m: Measurements, method: str) -> Iterator[str]:
    table = m.retained(m.roles.get("safety"))
    if table.empty or method not in table.index.get_level_values("method"):
        return
    for seed, row in table.xs(method, level="method").iterrows():
        holes = row[row.isna()].index
        started = [(c, s) for c, s in holes if row[c].notna().any()]
        if started:
            text = "; ".join(f"{condition} at step {step}" for condition, step in started)
            yield f"{method}, seed {seed}: safety not measured in {text}."
