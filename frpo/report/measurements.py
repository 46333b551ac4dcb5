"""A study's long table reduced to one number for each policy, quantity and point of downstream fine-tuning."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from frpo.study.results import StudyResults

COLUMNS = (
    "method", "family", "seed", "task", "step", "suite", "prompt_id", "sample", "quantity", "value", "status",
)  # fmt: skip
METHOD, DOWNSTREAM = "method.", "downstream."
FRPO, BASE = "FRPO", "base"
SINGLE_ROLES = ("safety", "helpfulness", "reward", "unseen", "sampled", "kl_reference", "kl_start")
# Judged quantities: where a failed judgement is possible and counted.
JUDGED_ROLES = ("safety", "helpfulness", "reward", "unseen", "tasks")
NUMERIC_FACTORS = ("lambda", "beta", "lr")


@dataclass(frozen=True)
class Measurements:
    """Means over prompts, and what the methods and downstream runs are.

    Args:
        results: the study they come from.
        methods: one row per method in display order: ``family`` and its factors without the prefix.
        conditions: one row per downstream run (task and factors), indexed by label: ``task`` and its factors.
        means: one row for each ``method``, ``seed``, ``condition`` ("" before fine-tuning), ``step`` and ``measure``
            ("suite/quantity"): ``value`` is the mean over prompts of the mean over a prompt's samples, ``prompts``,
            ``completions`` and ``failed`` are counts.
    """

    results: StudyResults
    methods: pd.DataFrame
    conditions: pd.DataFrame
    means: pd.DataFrame

    @property
    def roles(self) -> Mapping[str, Any]:
        """What the study's quantities mean."""
        return self.results.roles

    @property
    def baseline(self) -> str:
        """The method that everything is compared with."""
        return str(self.roles["baseline"])

    @property
    def retained_from(self) -> int:
        """The first downstream step that counts as retained."""
        return int(self.roles.get("retained_from", 1))

    @cached_property
    def safety_suites(self) -> dict[str, str]:
        """Further suites that measure safety: suite -> "suite/quantity"; the role ``unseen`` first."""
        own = self.roles.get("safety")
        same = [m for m in sorted(self.means["measure"].unique()) if own and _quantity(m) == _quantity(own)]
        others = [m for m in dict.fromkeys([self.roles.get("unseen"), *same]) if m and m != own]
        return {measure.partition("/")[0]: measure for measure in others}

    def rows(self, measure: str | None) -> pd.DataFrame:
        """The rows of one measure ("suite/quantity"), or of each task's own score for the role ``tasks``."""
        if measure == "tasks":
            wanted = self.roles.get("tasks") or {}
            task = self.means["condition"].map(self.conditions["task"].to_dict())
            return self.means[task.map(wanted).eq(self.means["measure"])]
        return self.means[self.means["measure"].eq(measure)]

    def before(self, measure: str | None) -> pd.Series:
        """A measure of the trained policies, before fine-tuning: by method and seed.

        The policy's own evaluation, or where that is missing step 0 of its downstream runs.
        """
        rows = self.rows(measure)
        start = rows[rows["step"].eq(0)].copy()
        start["own"] = start["condition"].eq("")
        best = start.groupby(["method", "seed"])["own"].transform("max")
        return start[start["own"].eq(best)].groupby(["method", "seed"])["value"].mean().dropna()

    def after(self, measure: str | None) -> pd.DataFrame:
        """A measure in downstream fine-tuning: rows (method, seed), columns (condition, step); NaN: not measured."""
        rows = self.rows(measure)
        rows = rows[rows["condition"].ne("")]
        return rows.pivot_table(index=["method", "seed"], columns=["condition", "step"], values="value", observed=True)

    def retained(self, measure: str | None) -> pd.DataFrame:
        """:meth:`after` for the steps that count as retained."""
        table = self.after(measure)
        if table.empty:
            return table
        return table.loc[:, table.columns.get_level_values("step") >= self.retained_from]

    def factor(self, method: str, name: str) -> Any:
        """A method's factor, or None where it has none."""
        value = self.methods[name].get(method) if name in self.methods else None
        return None if value is None or pd.isna(value) else value

    def family(self, method: str) -> str:
        """A method's family."""
        return str(self.methods.loc[method, "family"])

    def of_family(self, family: str) -> list[str]:
        """The methods of a family, in display order."""
        return list(self.methods.index[self.methods["family"].eq(family)])


def measure(results: StudyResults) -> Measurements:
    """Reduce a study's frame.

    Raises:
        ValueError: columns or roles are missing, or the baseline is no method of the study.
    """
    _check(results)
    frame = results.frame
    methods = _methods(frame, str(results.roles["baseline"]))
    conditions, condition = _conditions(frame)
    pair = frame.groupby(["suite", "quantity"], sort=False).ngroup()
    first = frame.loc[~pair.duplicated(), ["suite", "quantity"]].astype(str)
    names = dict(zip(pair[first.index], first["suite"] + "/" + first["quantity"], strict=True))
    wanted = _wanted(results.roles, names.values())
    name = pair.map({code: measure for code, measure in names.items() if measure in wanted})
    keep = name.notna()
    small = pd.DataFrame(
        {
            "method": frame["method"][keep].astype("category"),
            "seed": frame["seed"][keep],
            "condition": condition[keep],
            "step": frame["step"][keep],
            "measure": name[keep].astype("category"),
            "prompt_id": frame["prompt_id"][keep].astype("category"),
            "value": pd.to_numeric(frame["value"][keep], errors="coerce"),
            "failed": frame["status"][keep].eq("failed"),
        }
    )
    return Measurements(results, methods, conditions, _means(small))


def sampled_rewards(m: Measurements) -> pd.DataFrame:
    """Rewards of the trained policies' samples: rows (method, seed, prompt_id), one column per sample."""
    frame, role = m.results.frame, m.roles.get("sampled")
    if not role:
        return pd.DataFrame()
    suite, _, quantity = str(role).partition("/")
    keep = frame["suite"].eq(suite) & frame["quantity"].eq(quantity) & frame["step"].eq(0) & frame["task"].eq("")
    rows = frame.loc[keep, ["method", "seed", "prompt_id", "sample", "value"]]
    if rows.empty:
        return pd.DataFrame()
    rows = rows.assign(value=pd.to_numeric(rows["value"], errors="coerce"), method=rows["method"].astype(str))
    return rows.pivot_table(index=["method", "seed", "prompt_id"], columns="sample", values="value", dropna=False)


def _check(results: StudyResults) -> None:
    missing = [name for name in COLUMNS if name not in results.frame]
    if missing:
        raise ValueError(
            f"study {results.name!r}: the results lack the columns {', '.join(missing)}; "
            "read them with frpo.study.results.load_results"
        )
    if results.frame.empty:
        raise ValueError(f"study {results.name!r} has no measurements yet; run its cells first")
    names = sorted(map(str, results.frame["method"].unique()))
    baseline = results.roles.get("baseline")
    if baseline not in names:
        raise ValueError(
            f"study {results.name!r}: the role `baseline` is {baseline!r}, which has no measurements; "
            f"choose one of: {'; '.join(names)}"
        )
    _check_primary(results, names)


def _check_primary(results: StudyResults, names: Sequence[str]) -> None:
    """A primary method may have no measurements yet, where runs of it are missing; it has to be FRPO's."""
    primary = results.roles.get("primary")
    if primary is None or (primary not in names and any(t.startswith(f"{primary}, ") for t in results.missing)):
        return
    frpo = sorted(map(str, results.frame.loc[results.frame["family"].eq(FRPO), "method"].unique()))
    if primary not in frpo:
        raise ValueError(
            f"study {results.name!r}: the role `primary` is {primary!r}, which is no method of the family {FRPO} with "
            f"measurements; choose one of: {'; '.join(frpo)}, or leave it out"
        )


def _wanted(roles: Mapping[str, Any], present: Iterable[str]) -> set[str]:
    wanted = {str(roles[role]) for role in SINGLE_ROLES if roles.get(role)}
    wanted |= {str(value) for value in (roles.get("tasks") or {}).values()}
    safety = roles.get("safety")
    return wanted | {name for name in present if safety and _quantity(name) == _quantity(safety)}


def _quantity(measure: str) -> str:
    return measure.partition("/")[2]


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    cell: list[Hashable] = ["method", "seed", "condition", "step", "measure"]
    prompts = rows.groupby([*cell, "prompt_id"], observed=True, sort=False).agg(
        value=("value", "mean"), completions=("failed", "size"), failed=("failed", "sum")
    )
    means = prompts.groupby(level=cell, observed=True).agg(
        value=("value", "mean"),
        prompts=("value", "size"),
        completions=("completions", "sum"),
        failed=("failed", "sum"),
    )
    means = means.reset_index()
    return means.astype({"method": str, "condition": str, "measure": str})


def _methods(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    factors = [name for name in frame if str(name).startswith(METHOD)]
    methods = frame[["method", "family", *factors]].drop_duplicates("method").set_index("method")
    methods.index = methods.index.astype(str)
    methods.columns = [str(name).removeprefix(METHOD) for name in methods]
    methods = _numeric(methods)
    own = str(methods.loc[baseline, "family"])
    rank = {BASE: 0, own: 1, FRPO: 2}
    texts = [name for name in methods if name not in ("family", "beta_scale", *NUMERIC_FACTORS)]
    keys = (
        methods[texts]
        .astype(str)
        .assign(
            _family=methods["family"].map(lambda family: f"{rank.get(str(family), 3)}{family}"),
            _scale=methods["beta_scale"].eq("loss") if "beta_scale" in methods else False,
            _beta=methods.get("beta", 0.0),
            _lambda=-methods["lambda"] if "lambda" in methods else 0.0,
            _name=methods.index,
        )
    )
    return methods.loc[keys.sort_values(["_family", "_scale", *texts, "_beta", "_lambda", "_name"]).index]


def _conditions(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    factors = [name for name in frame if str(name).startswith(DOWNSTREAM)]
    columns = ["task", *factors]
    group = frame.groupby(columns, dropna=False, sort=True).ngroup()
    first = frame.loc[~group.duplicated(), columns].assign(group=group[~group.duplicated()])
    first.columns = ["task", *[str(name).removeprefix(DOWNSTREAM) for name in factors], "group"]
    first = _numeric(first)
    names = [name for name in first if name not in ("task", "group")]
    labels = {row["group"]: _label(row, names) for _, row in first.iterrows()}
    index = pd.Index([labels[g] for g in first["group"]], name="condition")
    conditions = first.drop(columns="group").set_index(index)
    conditions = conditions[conditions["task"].ne("")]
    return conditions.sort_values([*conditions.columns]), group.map(labels).astype("category")


def _label(row: pd.Series, names: list[str]) -> str:
    if row["task"] == "":
        return ""
    return ", ".join([str(row["task"]), *(f"{n} {number(row[n])}" for n in names if not pd.isna(row[n]))])


def _numeric(table: pd.DataFrame) -> pd.DataFrame:
    for name in NUMERIC_FACTORS:
        if name in table:
            table[name] = pd.to_numeric(table[name], errors="coerce")
    return table


def number(value: object) -> str:
    """A factor's value as it is read: 0.001, 3e-05, full."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
