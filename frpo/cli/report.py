"""``frpo report``: the page of a study's results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from frpo.evaluation.records import read_frame
from frpo.foundation.errors import ConfigError
from frpo.report.results import StudyResults
from frpo.study.cells import Cell
from frpo.study.folder import REPORT, cell_folder, read_plan, state_of, version_of


def main(args: list[str]) -> int:
    """Write the report of a study: ``frpo report STUDY_DIR [--out DIR]``."""
    parser = argparse.ArgumentParser(
        prog="frpo report",
        description="Write one HTML page, figures and tables from the results of a study, finished or not.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, metavar="STUDY_DIR", help="the folder of a study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: STUDY_DIR/report)")
    options = parser.parse_args(args)
    try:
        write(options.study, options.out or options.study / REPORT)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return 0


def write(study: Path, out: Path) -> Path:
    """Write the report of ``study`` to the folder ``out`` and print it in a few lines; returns the page."""
    from frpo.report.page import build
    from frpo.report.text import summary

    results = load_results(study)
    page = build(results, out)
    print(f"{summary(results)}\n\nReport: {page}", flush=True)
    return page


def load_results(study: Path | str) -> StudyResults:
    """Read the evaluations of every finished cell.

    Raises:
        ConfigError: the folder holds no study.
        ValueError: no cell is done yet.
    """
    study = Path(study)
    name, roles, cells = read_plan(study)
    states = {cell.id: state_of(study, cell) for cell in cells}
    done = [cell for cell in cells if states[cell.id] == "done"]
    frames = [_frame(study, cell) for cell in done if cell.compare]
    if not frames:
        raise ValueError(f"{study}: no cell of the study {name} is done yet; `frpo study status {study}` tells more")
    left = [cell for cell in cells if cell not in done and (cell.compare or cell.kind == "downstream")]
    missing = tuple(cell.title + (" (failed)" if states[cell.id] == "failed" else "") for cell in left)
    versions = tuple(sorted({version_of(study, cell) for cell in done}))
    return StudyResults(name, pd.concat(frames, ignore_index=True), roles, missing, versions)


def _frame(study: Path, cell: Cell) -> pd.DataFrame:
    frame = read_frame(cell_folder(study, cell.id)).rename(columns={"task": "prompt_task"})
    if cell.kind == "policy":  # what its training evaluated on the way is at later steps
        frame = frame[frame["step"] == 0]
    labels: dict[str, Any] = {"method": cell.method, "family": cell.family, "seed": cell.seed, "task": cell.task}
    labels |= {f"method.{key}": value for key, value in cell.factors.items()}
    labels |= {f"downstream.{key}": value for key, value in cell.downstream.items()}
    return frame.assign(**labels)
