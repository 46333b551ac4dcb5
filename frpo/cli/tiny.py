"""``frpo tiny``: FRPO and GRPO on the tiny world, from nothing to a table, on a CPU within minutes."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from frpo.cli.training import evaluate, fit
from frpo.cli.yaml_files import read_mapping

METHODS = {"FRPO": "frpo", "GRPO": "grpo"}
FOLDER = Path("outputs/tiny")
USAGE = """usage: frpo tiny [--key value ...]

Trains FRPO and GRPO on the tiny world by the recipes tiny/frpo and tiny/grpo, evaluates both and the policy they
started from on held-out prompts, and prints a table. Everything goes to outputs/tiny/, where an earlier comparison is
replaced. Further settings are those of `frpo fit` and go to both runs."""
PROGRESS = '[{"class_path": "frpo.callbacks.progress.Progress"}]'
COLUMNS = {"reward": "reward", "kl_sequence": "KL", "worst_case_reward": "worst case"}


def main(args: list[str]) -> int:
    """Run the comparison and print it."""
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    torch.set_num_threads(1)  # a model this small loses more to handing out work than it gains
    _quieten()
    started = time.monotonic()
    for method, recipe in METHODS.items():
        print(f"== {method}: frpo fit --config recipes/tiny/{recipe}.yaml", flush=True)
        own = ["--name", f"tiny-{recipe}", "--output_dir", str(FOLDER / recipe), "--overwrite", "true"]
        fit(["--config", f"recipes/tiny/{recipe}.yaml", "--trainer.log_every_n_steps", "5", *args, *own])
    print("== held-out prompts", flush=True)
    first, *_ = METHODS.values()
    rows = {"start": _held_out(first, [])}
    rows |= {method: _held_out(recipe, ["--ckpt_path", "last"]) for method, recipe in METHODS.items()}
    config = read_mapping(FOLDER / first / "config.yaml")
    print(report(rows, config), f"\n{time.monotonic() - started:.0f} seconds", sep="")
    return 0


def _quieten() -> None:
    """Keep what libraries say of themselves out of the comparison."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()


def _held_out(recipe: str, checkpoint: list[str]) -> Mapping[str, float]:
    quiet = ["--trainer.logger", "false", "--trainer.callbacks", PROGRESS]
    config = str(FOLDER / recipe / "config.yaml")
    return evaluate("validate", ["--config", config, *quiet, *checkpoint], verbose=False)


def report(rows: Mapping[str, Mapping[str, float]], config: Mapping[str, Any]) -> str:
    """A table of the validation metrics by method, what they mean, and where to look further."""
    tasks = sorted({name for metrics in rows.values() for name in metrics if name.startswith("val/reward/")})
    columns = {f"val/{name}": title for name, title in COLUMNS.items()}
    columns = {"val/reward": "reward", **{name: name.removeprefix("val/reward/") for name in tasks}, **columns}
    lines = [f"{'':<8}" + "".join(f"{title:>12}" for title in columns.values())]
    for method, metrics in rows.items():
        lines.append(f"{method:<8}" + "".join(_cell(metrics, name) for name in columns))
    model = config["model"]["init_args"]
    return "\n".join(
        [
            "",
            *lines,
            "",
            "reward      mean over held-out prompts in [0, 1], all and by task",
            "KL          to the policy at the start, nats a completion",
            f"worst case  mean reward of the worst policy within {model['rho']} nats of KL a completion",
            "",
            f"Completions, metrics and checkpoints: {', '.join(f'{FOLDER / recipe}/' for recipe in METHODS.values())}",
            *_mlflow(config),
        ]
    )


def _cell(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:>12.3f}" if name in metrics else f"{'-':>12}"


def _mlflow(config: Mapping[str, Any]) -> list[str]:
    loggers = config["trainer"]["logger"] or []
    uris = [logger["init_args"].get("tracking_uri") for logger in loggers]
    executable = Path(sys.executable).with_name("mlflow")
    shown = executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable
    return [f"Curves: {shown} ui --backend-store-uri {uri}" for uri in uris if uri]
