"""metrics.csv: one row per logged step, kept across a kill and a resume."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from frpo.foundation.durable import cut_torn_line, disk_error, free_name, write_whole

Row = dict[str, str]
_AXES = {"step", "epoch"}


class MetricsCSV(Logger):
    """Writes every logged metric to ``<output_dir>/metrics.csv``, flushed row by row.

    Columns are ``step`` and the metrics seen so far; a metric that a row does not have is empty there. Lightning's
    ``CSVLogger`` deletes the file of an earlier run in the same folder, a resumed one included, and writes
    hyperparameters with their secrets beside it; this one keeps the rows and writes metrics alone.

    On :meth:`begin` a fresh run moves an earlier file aside (``metrics.1.csv``). A resumed one drops, at its first row,
    the rows of later steps, for it produces them again; of the same step those that it does produce again: a validation
    before the checkpoint has the step of the rollout after it, and is not repeated.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__()
        self._path = Path(output_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._opened = self._rerun = False
        self._first_step: int | None = None

    @property
    def name(self) -> str:
        """Empty: the file lies in the output folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: there is one file per output folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's output folder."""
        return str(self._path.parent)

    @rank_zero_only
    def begin(self, resumed: bool) -> None:
        """Say whether the fit that starts is fresh or goes on from a checkpoint."""
        self._rerun, self._first_step = resumed, None
        if not resumed and not self._opened and self._path.is_file():
            self._path.rename(free_name(self._path))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        step = step or 0
        row = {"step": str(step), **{name: str(value) for name, value in metrics.items()}}
        self._open()
        self._drop_repeated(step, set(row) - _AXES)
        new = sorted(set(row) - set(self._columns))
        if new:
            rows = self._rows()
            self._columns = ["step", *self._columns[1:], *(name for name in new if name != "step")]
            write_whole(self._path, self._format([*rows, row], header=True))
            return
        try:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._format([row], header=False))
        except OSError as error:
            raise disk_error(self._path, error) from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in config.yaml."""

    def _open(self) -> None:
        if not self._opened:
            self._opened = True
            cut_torn_line(self._path)
            rows = self._rows()
            self._columns = list(rows[0]) if rows else []

    def _drop_repeated(self, step: int, names: set[str]) -> None:
        if not self._rerun:
            return
        if self._first_step is None:
            self._first_step = step
        if step > self._first_step:
            self._rerun = False
            return
        rows = self._rows()
        kept = [row for row in rows if (at := int(row["step"])) < step or (at == step and not _shares(row, names))]
        if len(kept) < len(rows):
            write_whole(self._path, self._format(kept, header=True))

    def _rows(self) -> list[Row]:
        if not self._path.is_file():
            return []
        try:
            with self._path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"the row of step {row.get('step')!r} has not one cell a column")
                int(row["step"])
        except (ValueError, KeyError, csv.Error) as error:
            raise ValueError(
                f"{self._path} is damaged ({type(error).__name__}: {error}), expected a header and a row a logged "
                "step; mend it, or move it away to start another"
            ) from error
        return rows

    def _format(self, rows: list[Row], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _shares(row: Row, names: set[str]) -> bool:
    return any(row.get(name) for name in names)
