"""Evaluations on disk: ``<output_dir>/evaluation/<suite>/step=<step>.jsonl``, one JSON object per completion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from frpo.foundation.durable import write_whole
from frpo.foundation.json_values import plain

FOLDER = "evaluation"
COLUMNS = ("suite", "step", "prompt_id", "task", "sample", "quantity", "value", "status")
Row = dict[str, Any]


def record_path(output_dir: Path | str, suite: str, step: int) -> Path:
    """The file of one suite at one step."""
    return Path(output_dir) / FOLDER / suite / f"step={step:06d}.jsonl"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` as one whole file, in place of what was there; a number that is not finite becomes null."""
    write_whole(path, "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_file(path: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        ValueError: a line that is not one evaluated completion, named by file and number.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        return [_parse(line, path, number) for number, line in enumerate(file, start=1)]


def read_rows(output_dir: Path | str) -> Iterator[Row]:
    """Every evaluated completion of a run: suite by suite, step by step, in prompt order.

    Raises:
        FileNotFoundError: the run has no evaluation.
        ValueError: a damaged line, named by file and number.
    """
    folder = Path(output_dir) / FOLDER
    files = sorted(folder.glob("*/step=*.jsonl"), key=lambda path: (path.parent.name, _step(path)))
    if not files:
        raise FileNotFoundError(
            f"no evaluation in {folder}, expected <suite>/step=<step>.jsonl there; add the callback "
            "frpo.evaluation.callback.Evaluation to the run, or evaluate its checkpoint by `frpo evaluate`"
        )
    for path in files:
        yield from read_file(path)


def read_frame(output_dir: Path | str) -> pd.DataFrame:
    """Every evaluation of a run as a table, one row per completion and quantity.

    Columns: ``suite``, ``step`` (optimiser steps), ``prompt_id``, ``task``, ``sample``, ``quantity`` (a score's name,
    ``kl/<name>/sequence`` in nats per completion, or ``kl/<name>/token`` in nats per token), ``value`` (NaN where there
    is none) and ``status`` (value, abstain or failed). Errors as :func:`read_rows`.
    """
    return frame(read_rows(output_dir))


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The table of :func:`read_frame` from rows at hand."""
    table = pd.DataFrame(
        [
            (row["suite"], row["step"], row["prompt_id"], row["task"], row["sample"], quantity, value, status)
            for row in rows
            for quantity, (value, status) in quantities(row).items()
        ],
        columns=list(COLUMNS),
    )
    return table.astype({"step": "int64", "sample": "int64", "value": "float64"})


def quantities(row: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Value and status of each quantity of a completion; NaN where there is no value."""
    found = {
        name: (math.nan if score["value"] is None else float(score["value"]), str(score["status"]))
        for name, score in row["scores"].items()
    }
    for name, parts in row["kl"].items():
        for part, value in parts.items():
            # A KL that overflowed was written as null.
            missing = value is None
            found[f"kl/{name}/{part}"] = (math.nan, "failed") if missing else (float(value), "value")
    return found


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step=")
    if not digits.isdigit():
        raise ValueError(f"{path}: expected the name step=<number>.jsonl; move other files out of {FOLDER}/")
    return int(digits)


def _parse(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
        found = quantities(row)
        names = [row["suite"], row["prompt_id"], row["task"], *found, *(status for _, status in found.values())]
        "".join(names).encode()  # names are text, and whole: half of a surrogate pair can be escaped in JSON
        for name in ("step", "sample"):
            if type(row[name]) is not int or abs(row[name]) >= 2**63:
                raise TypeError(f"{name} must be a whole number")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}: damaged ({type(error).__name__}: {error}), expected one evaluated completion as "
            "JSON; evaluations are written whole, so the file was changed later: remove it and evaluate again"
        ) from error
    return dict(row)
