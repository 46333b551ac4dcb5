"""The folder of a study: its plan, its cells, its report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError
from frpo.study.cells import Cell
from frpo.study.spec import StudySpec

PLAN = "plan.json"
REPORT = "report"
CONFIGURATION = ("policy", "layers")
"""What of a cell the plan leaves out: its run records its configuration, without secrets."""


def write_plan(study: Path, spec: StudySpec, cells: Sequence[Cell]) -> None:
    """Keep what the cells of the study are: what its folder holds can be read without its YAML."""
    kept = [{key: value for key, value in asdict(cell).items() if key not in CONFIGURATION} for cell in cells]
    plan = {"name": spec.name, "roles": dict(spec.roles), "cells": kept}
    write_whole(study / PLAN, json.dumps(plan, indent=1, default=str) + "\n")


def read_plan(study: Path) -> tuple[str, dict[str, Any], list[Cell]]:
    """Name, roles for the report, and cells of the study in a folder.

    Raises:
        ConfigError: the folder holds no study, or a damaged one.
    """
    file = study / PLAN
    if not file.is_file():
        raise ConfigError(
            f"{study}: no study is here (no {PLAN}); give the output folder of `frpo study run`, which by default is "
            "outputs/studies/NAME"
        )
    with readable(file):
        plan = json.loads(file.read_bytes())
        found = str(plan["name"]), dict(plan["roles"]), [_cell(cell) for cell in plan["cells"]]
    return found


def _cell(kept: dict[str, Any]) -> Cell:
    cell = Cell(**kept)
    for name in ("id", "kind", "method", "family", "task"):
        if not isinstance(getattr(cell, name), str):
            raise TypeError(f"the {name} of a cell must be text")
    if not re.fullmatch(r"[\w.-]{1,200}", cell.id) or cell.id.startswith("."):
        raise ValueError(f"the cell {cell.id!r:.60} names no folder")
    return cell


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Within, a damaged file of the study is a :class:`ConfigError` that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is damaged ({type(error).__name__}: {error}); it was changed after `frpo study run` wrote it: "
            "remove it and run the study again"
        ) from error
