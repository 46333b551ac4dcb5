"""``frpo study``: a grid of runs, fine-tuned and measured, that can be stopped and taken up again."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from frpo.foundation.errors import ConfigError
from frpo.foundation.redaction import redact_text
from frpo.study.cells import Cell, expand
from frpo.study.folder import REPORT, STATES, failure, is_done, read_plan, state_of, summary, write_plan
from frpo.study.reading import read_study
from frpo.study.runner import Runner, default_workers

OUTPUT = Path("outputs/studies")


def run(args: list[str]) -> int:
    """``frpo study run STUDY.yaml``: run what is not done yet, then write the report; 1 where a cell failed."""
    parser = argparse.ArgumentParser(
        prog="frpo study run",
        description="Run the cells of a study that are not done yet: train each method, fine-tune it downstream, "
        "evaluate all along, and write the report. Stop it whenever you like; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "study", help="the YAML of a study: a file here, or a shipped one such as recipes/studies/tiny.yaml"
    )
    parser.add_argument("--output_dir", type=Path, help=f"folder of the study; by default {OUTPUT}/NAME")
    parser.add_argument("--data_dir", help="folder of the data files, in place of the study's own `data_dir`")
    parser.add_argument("--workers", type=int, help="cells run at once; by default cores / threads of a cell")
    parser.add_argument(
        "--shard", default="1/1", metavar="K/N",
        help="run the K-th of N parts (from 1): one task of a scheduler's array; parts may run at once",
    )  # fmt: skip
    parser.add_argument("--no_report", action="store_true", help="leave out the report at the end")
    options = parser.parse_args(args)
    # What only a run needs; `frpo study status` answers without.
    from frpo.cli import report
    from frpo.cli.cell import PRELOAD, check_runs, run_cell
    from frpo.cli.study_tracking import close_parent, open_parent, tracking_settings

    spec = read_study(options.study)
    if options.data_dir is not None:
        spec = replace(spec, data_dir=options.data_dir)
    tracking = tracking_settings(spec)
    cells = expand(spec)
    folder = options.output_dir or OUTPUT / spec.name
    workers = default_workers(spec.threads) if options.workers is None else options.workers
    if workers < 1:
        raise ConfigError(f"--workers: got {workers}, expected at least 1")
    mine = shard(cells, options.shard)
    write_plan(folder, spec, cells)
    _say(f"study {spec.name}: {len(mine)} of {len(cells)} cells with {workers} at once, in {folder}")
    check_runs([cell for cell in mine if not is_done(folder, cell)], folder)
    tracker = None
    if tracking is not None:
        tracker, tracking = open_parent(spec.name, tracking, folder)
    left = Runner(folder, mine, workers, partial(run_cell, spec, folder, tracking), PRELOAD, _say).run()
    complete = all(is_done(folder, cell) for cell in cells)
    files: list[Path] = []
    try:
        if complete and not options.no_report:
            page = report.write(folder, folder / REPORT)
            files = sorted(file for file in page.parent.iterdir() if file.is_file())
    finally:  # the runs are what they are, whether or not the report could be written
        if tracker is not None:
            close_parent(tracker, files, "success" if complete else "failed" if left else None)
    if tracking is not None:
        uri = str(tracking.get("tracking_uri", "sqlite:///mlflow.db"))
        _say(f"Runs: mlflow ui --backend-store-uri {redact_text(uri)}")
    return 1 if left else 0


def status(args: list[str]) -> int:
    """``frpo study status FOLDER``: what is done, running, failed and left, by method."""
    parser = argparse.ArgumentParser(prog="frpo study status", description=status.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of the study, outputs/studies/NAME")
    folder = parser.parse_args(args).folder
    _, _, cells = read_plan(folder)
    print(summary(folder, cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    width = max(map(len, methods))
    print(f"{'':<{width}}" + "".join(f"{state:>9}" for state in STATES))
    for method in methods:
        states = [state_of(folder, cell) for cell in cells if cell.method == method]
        print(f"{method:<{width}}" + "".join(f"{states.count(state):>9}" for state in STATES))
    for cell in cells:
        if state_of(folder, cell) == "failed":
            print(f"failed: {cell.title}: {failure(folder, cell)}")
    return 0


def shard(cells: list[Cell], which: str) -> list[Cell]:
    """The part ``K/N`` of the cells: policies take turns, each with its downstream runs and what it starts from."""
    found = re.fullmatch(r"(\d+)/(\d+)", which)
    k, n = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= k <= n:
        raise ConfigError(
            f"--shard: got {which!r}, expected K/N with 1 <= K <= N; a Slurm array writes $SLURM_ARRAY_TASK_ID/16"
        )
    by_id = {cell.id: cell for cell in cells}
    policies = [cell.id for cell in cells if cell.kind == "policy"]
    wanted = set(policies[k - 1 :: n])
    wanted |= {cell.id for cell in cells if cell.kind == "downstream" and cell.parent in wanted}
    for name in list(wanted):
        parent = by_id[name].parent
        while parent is not None:
            wanted.add(parent)
            parent = by_id[parent].parent
    return [cell for cell in cells if cell.id in wanted]


def _say(line: str) -> None:
    print(line, flush=True)
