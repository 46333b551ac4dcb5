"""Reading the configuration of a study's runs before the first of them costs anything."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from frpo.foundation.errors import ConfigError
from frpo.study.cells import Cell, replaced
from frpo.study.one import written
from frpo.study.spec import StudySpec


def check_runs(spec: StudySpec, cells: Sequence[Cell], study: Path) -> None:
    """Build, without loading anything, the run of one cell of each method and each downstream task.

    Raises:
        ConfigError: a recipe, a setting or a key of a grid is wrong; the message names the cell.
    """
    chosen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if cell.layers:
            chosen.setdefault((cell.kind, cell.task or cell.method), cell)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for cell in chosen.values():
        _check(cell, study)


def _check(cell: Cell, study: Path) -> None:
    from frpo.cli.parsing import FrpoCLI

    names = {"start": str(study / "start"), "reference": str(study / "reference"), "seed": str(cell.seed)}
    quiet = {"name": cell.id, "output_dir": str(study / "check"), "trainer": {"logger": False}}
    # One process on the processor: what the run asks for may be another machine's.
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    with tempfile.TemporaryDirectory() as scratch:
        words = written([*replaced(cell.layers, names), quiet], Path(scratch))
        try:
            # What it warns of is in the log of the run that does it.
            with contextlib.redirect_stderr(io.StringIO()):
                FrpoCLI("fit", [*words, *here])
        except ConfigError as error:
            text = str(error).replace(f"{scratch}/", "layer ")
            raise ConfigError(f"{cell.title}: its run cannot be configured:\n{text}") from error
