"""``frpo evaluate``: suites on a policy without training it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from frpo.cli.parsing import FrpoCLI
from frpo.cli.training import refusals
from frpo.evaluation.callback import Evaluation
from frpo.evaluation.intervals import mean_interval
from frpo.evaluation.records import frame, read_file, record_path
from frpo.foundation.errors import ConfigError
from frpo.models.checkpoint import load_policy
from frpo.modules.evaluated import EvaluatedPolicy

TRAINER = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}
"""What an evaluation leaves out unless it is asked for."""
EXAMPLE = "frpo evaluate --config conf/evaluation/tiny.yaml --ckpt_path CHECKPOINT"


def main(args: list[str]) -> int:
    """Evaluate: ``frpo evaluate --config SUITES (--model.policy.path DIR | --ckpt_path FILE) [--key value ...]``."""
    cli = FrpoCLI("evaluate", args, model=EvaluatedPolicy, trainer=TRAINER)
    callbacks = [c for c in cli.trainer.callbacks if isinstance(c, Evaluation)]  # type: ignore[attr-defined]
    module = cli.model
    if not isinstance(module, EvaluatedPolicy):
        raise ConfigError(
            f"model.class_path: got {type(module).__name__}, which trains; leave the run's configuration out, as its "
            f"checkpoint says which policy it holds: {EXAMPLE}"
        )
    if not callbacks:
        raise ConfigError(f"evaluation.suites: there are none; give some by --config: {EXAMPLE}")
    _take_checkpoint(cli, module)
    with refusals(cli.trainer):
        cli.trainer.test(module, verbose=False)
    if cli.trainer.is_global_zero:
        for callback in callbacks:
            print(table(callback.output_dir, list(callback.suites), module.step))
    return 0


def _take_checkpoint(cli: FrpoCLI, module: EvaluatedPolicy) -> None:
    path = cli.checkpoint()
    if path is None:
        return
    if module.description is not None:
        raise ConfigError("got both model.policy and ckpt_path, which brings its own policy; leave one of them out")
    try:
        module.take(load_policy(path))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def table(output_dir: Path, suites: list[str], step: int) -> str:
    """The means of the suites at ``step`` with 95% bootstrap intervals over prompts; by task if several."""
    titles = f"{'mean':>8}  {'95% interval':<18} {'prompts':>7} {'no value':>8}"
    lines = [f"{'suite':<16} {'quantity':<24} {'task':<12} {titles}"]
    for suite in suites:
        path = record_path(output_dir, suite, step)
        rows = frame(read_file(path))
        for quantity, found in rows.groupby("quantity", sort=False):
            lines += [_line(suite, str(quantity), task, part) for task, part in _parts(found)]
    return "\n".join([*lines, f"step {step}; rows in {output_dir}/evaluation/<suite>/{record_path('', '', step).name}"])


def _parts(found: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "", found
    if found["task"].nunique() > 1:
        yield from ((str(task), part) for task, part in found.groupby("task"))


def _line(suite: str, quantity: str, task: str, rows: pd.DataFrame) -> str:
    valued = rows.dropna(subset="value")
    head = f"{suite:<16} {quantity:<24} {task:<12}"
    if valued.empty:
        return f"{head} {'-':>8}  {'':<18} {0:>7} {len(rows):>8}"
    by_prompt = [group.to_numpy() for _, group in valued.groupby("prompt_id")["value"]]
    found = mean_interval(by_prompt)
    interval = f"{found.low:.3f} to {found.high:.3f}"
    return f"{head} {found.value:>8.3f}  {interval:<18} {len(by_prompt):>7} {len(rows) - len(valued):>8}"
