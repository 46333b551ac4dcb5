"""``frpo plan``: what a run will hold in memory, computed without loading it."""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning.pytorch import Trainer

from frpo.cli.job import read_job
from frpo.cli.parsing import FrpoCLI
from frpo.foundation.errors import ConfigError
from frpo.plan.jobs import Job
from frpo.plan.memory import MMAP_THRESHOLD, available, parse_bytes, show_bytes
from frpo.plan.plan import Line, MemoryPlan
from frpo.plan.planner import Advice, advise, make_plan
from frpo.plan.ranks import Ranks, read_ranks

HELP = """usage: frpo plan --config RECIPE [--memory 24GiB] [--key value ...]

Say what a run of `frpo fit` with the same words will hold in memory on each rank, without loading weights or data.

  --memory AMOUNT  what a rank has (24GiB, 80GB); by default what is here: the smallest GPU, or the machine's share.
                   A run that needs more is refused (exit status 2), with the settings to turn, most saved first.
"""
GPUS = ("gpu", "cuda")


class _PlanCLI(FrpoCLI):
    """As for ``fit``, but its Trainer is one of this machine: a GPU's run is planned where there is none."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that does nothing."""
        return Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )


def main(args: list[str]) -> int:
    """Plan: ``frpo plan --config RECIPE [--memory AMOUNT] [--key value ...]``."""
    if not args or args in (["--help"], ["-h"]):
        print(HELP)
        return 0 if args else 2
    words, memory = _take_memory(args)
    cli = _PlanCLI("plan", words)
    trainer = cli.config_init.trainer
    accelerator = str(trainer.accelerator)
    try:
        limit = None if memory is None else parse_bytes(memory)
        gpu = accelerator in GPUS or (accelerator == "auto" and available(gpu=True) is not None)
        ranks = read_ranks(trainer.strategy, trainer.devices, trainer.num_nodes, gpu=gpu)
        job = read_job(cli.model, cli.datamodule, precision=trainer.precision, suites=cli.config_init.evaluation.suites)
        plan = make_plan(job, ranks, gpu=gpu)
        here = ranks.number // trainer.num_nodes
        if limit is None:
            limit = available(gpu=gpu)
            limit = limit if limit is None or gpu else limit // here
        print(text(plan, ranks, limit))
        if here > 1:
            print(
                f"while loading: each of a machine's {here} ranks reads policy and reference whole, together "
                f"{show_bytes(here * plan.loaded)} of the machine's memory"
            )
        if not gpu and MMAP_THRESHOLD not in os.environ:
            print(
                "on a CPU glibc may keep blocks that were freed beside these, up to as much again; in the environment, "
                f"{MMAP_THRESHOLD}=262144 has it give them back, at some cost in time"
            )
        if limit is None or plan.total <= limit:
            return 0
        print(refusal(job, ranks, plan, limit, gpu=gpu), file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _take_memory(args: list[str]) -> tuple[list[str], str | None]:
    words, memory = [], None
    left = iter(args)
    for word in left:
        if word == "--memory":
            memory = next(left, "")
        elif word.startswith("--memory="):
            memory = word.partition("=")[2]
        else:
            words.append(word)
    return words, memory


def text(plan: MemoryPlan, ranks: Ranks, limit: int | None) -> str:
    """The plan as a table."""
    lines = [
        f"memory of one rank, {ranks.name}, with prompts and completions as long as the configuration allows",
        f"parameters: {plan.trainable:,} train, {plan.frozen:,} are frozen",
        "held throughout",
        *map(_row, plan.held),
    ]
    for phase in plan.phases:
        mark = "  <- largest" if phase is plan.largest else ""
        lines += [f"{phase.name}, {show_bytes(phase.total)}{mark}", *map(_row, phase.lines)]
    has = (
        "what the device has is not known here; say it by --memory 24GiB"
        if limit is None
        else f"{show_bytes(limit)} are there: {'fits' if plan.total <= limit else 'does not fit'}"
    )
    return "\n".join([*lines, f"peak: {show_bytes(plan.total)}, in the phase {plan.largest.name}; {has}"])


def _row(line: Line) -> str:
    return f"  {line.name:<18} {show_bytes(line.bytes):>11}  {line.how}"


def refusal(job: Job, ranks: Ranks, plan: MemoryPlan, limit: int, *, gpu: bool) -> str:
    """Why the run is refused, and the settings to turn, most saved first."""
    found = advise(job, ranks, plan, limit, gpu=gpu)
    head = f"frpo plan: the run needs {show_bytes(plan.total)} and {show_bytes(limit)} are there"
    if not found:
        return f"{head}; no setting saves memory here: take a smaller model, or a larger device"
    rows = [_advice(one, plan, limit) for one in found]
    alone = "" if any(one.plan.total <= limit for one in found) else "; none is enough alone, so combine them"
    return "\n".join([f"{head}; turn{alone}:", *rows])


def _advice(one: Advice, plan: MemoryPlan, limit: int) -> str:
    fits = "fits" if one.plan.total <= limit else "not enough alone"
    saved = show_bytes(plan.total - one.plan.total)
    return f"  {one.setting}: saves {saved}, {show_bytes(one.plan.total)} are left ({fits})"
