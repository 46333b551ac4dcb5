"""The report of a study: one HTML page that needs nothing else, its figures as PNG files, and its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from frpo import __version__
from frpo.foundation.json_values import plain
from frpo.report import curves, robust_figures, sweeps
from frpo.report.baseline import KINDS, LESS, MORE
from frpo.report.measurements import Measurements, measure, sampled_rewards
from frpo.report.robust import bias_study, distributions
from frpo.report.style import Picture, Styles, drawing
from frpo.report.tables import Table, failures, methods_table, missing
from frpo.report.verdict import Verdict, verdict
from frpo.study.results import StudyResults

MOST_MISSING = 12
PAGE_NAME, SUMMARY_NAME, TABLES_NAME = "report.html", "summary.json", "tables.csv"


def build(results: StudyResults, out_dir: str | Path) -> Path:
    """Write ``report.html``, the figures as PNG, ``summary.json`` (all numbers) and ``tables.csv``; return the page.

    The same results give the same bytes. Holes in a study (cells, seeds, roles) are named on the page.

    Raises:
        ValueError: the results hold no measurements, lack columns, or name a baseline that is not there.
    """
    m = measure(results)
    found, table, bias = verdict(m), methods_table(m), _bias(m)
    with drawing():
        pictures = list(_pictures(m, table, found, bias))
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    summary = json.dumps(plain(_summary(m, table, found, bias)), indent=1, sort_keys=True, allow_nan=False)
    (folder / SUMMARY_NAME).write_text(summary + "\n", encoding="utf-8")
    table.long().to_csv(folder / TABLES_NAME, index=False)
    page = folder / PAGE_NAME
    page.write_text(render(m, table, found, pictures), encoding="utf-8")
    return page


def _bias(m: Measurements) -> pd.DataFrame:
    table = sampled_rewards(m)
    trained = table[table.index.get_level_values("method").map(m.family) != "base"] if not table.empty else table
    rewards = distributions(trained) if not trained.empty else None
    study = bias_study(rewards, robust_figures.study_lambdas(m)) if rewards else pd.DataFrame()
    study.attrs = {"prompts": int(rewards.weights.sum()), "samples": rewards.samples} if rewards else {}
    return study


def _pictures(m: Measurements, table: Table, found: Verdict, bias: pd.DataFrame) -> Iterator[Picture]:
    styles = Styles(m)
    drawn = [
        sweeps.matched_figure(m, styles, table, found.primary),
        *curves.retention(m, styles, found.primary),
        curves.by_drift(m, styles, found.primary),
        sweeps.tradeoff(m, styles, table, found.primary),
        sweeps.learning_rates(m, styles, found.primary),
        sweeps.lambda_sweep(m, styles, table),
        sweeps.beta_sweep(m, styles, table),
        robust_figures.worst_case_figure(m, styles, found.primary),
        robust_figures.bias_figure(bias, bias.attrs["prompts"], bias.attrs["samples"]) if len(bias) else None,
    ]
    yield from (picture for picture in drawn if picture)


def render(m: Measurements, table: Table, found: Verdict, pictures: list[Picture]) -> str:
    """The page."""
    seeds = m.means.groupby("method")["seed"].nunique()
    first = [picture for picture in pictures if picture.name == "matched"]
    methods = dict.fromkeys(c.method for c in found.comparisons)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("frpo", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        name=m.results.name,
        scope=_scope(m),
        verdict=found,
        own=[c for c in found.comparisons if c.method == found.primary],
        missing=missing(m),
        not_done=m.results.missing,
        most=MOST_MISSING,
        first=first,
        rest=[picture for picture in pictures if picture not in first],
        comparisons=[(method, found.of(method)) for method in methods],
        kinds=[kind for kind in KINDS if any(c.kind == kind for c in found.comparisons)],
        family=m.family(m.baseline),
        baseline=m.baseline,
        table=table,
        seeds=seeds,
        failed=failures(m)["share"],
        made=_made(m),
        tones={MORE: "more", LESS: "less"},
    )


def _scope(m: Measurements) -> str:
    tasks, settings = m.conditions["task"].nunique(), len(m.conditions)
    return (
        f"{_count(len(m.methods), 'method')}, {_count(m.means['seed'].nunique(), 'seed')}, "
        f"{_count(tasks, 'downstream task')} in {_count(settings, 'setting')}. Baseline: {m.baseline}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _made(m: Measurements) -> dict[str, str]:
    frame, means = m.results.frame, m.means
    trained = means.groupby(["method", "seed"]).ngroups
    downstream = means[means["condition"].ne("")].groupby(["method", "seed", "condition"]).ngroups
    prompts = means.groupby("measure")["prompts"].max()
    roles = {key: value for key, value in m.roles.items() if key != "tasks"} | dict(m.roles.get("tasks") or {})
    return {
        "study": m.results.name,
        "policies": f"{trained} (methods x seeds)",
        "downstream runs": f"{downstream}",
        "seeds": ", ".join(str(seed) for seed in sorted(means["seed"].unique())),
        "downstream settings": "; ".join(m.conditions.index) or "none",
        "measured steps": ", ".join(str(step) for step in sorted(means["step"].unique())),
        "prompts": "; ".join(f"{name}: {count}" for name, count in prompts.items()),
        "rows": f"{len(frame)} (one per completion and quantity)",
        "roles": "; ".join(f"{key}: {value}" for key, value in roles.items()),
        "code of the runs": "; ".join(sorted(set(m.results.versions))) or "not recorded",
        "report by": f"frpo {__version__}",
    }


def _summary(m: Measurements, table: Table, found: Verdict, bias: pd.DataFrame) -> dict[str, Any]:
    words = [{"word": c.word, "where": c.where, "detail": c.detail()} for c in found.comparisons]
    return {
        "study": m.results.name,
        "roles": m.roles,
        "headline": found.headline,
        "primary": found.primary,
        "rule": found.rule,
        "warnings": found.warnings,
        "notes": found.notes,
        "curve_errors": found.curve_errors,
        "comparisons": [asdict(c) | text for c, text in zip(found.comparisons, words, strict=True)],
        "methods": {method: {n: asdict(i) for n, i in cells.items()} for method, cells in table.cells.items()},
        "columns": table.columns,
        "failed_judgements": failures(m).to_dict("index"),
        "missing": missing(m),
        "not_done": m.results.missing,
        "bias": bias.to_dict("records"),
        "made": _made(m),
    }
