"""Suites run during training, or on their own: rows in files, means in the loggers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tqdm import tqdm

from frpo.data.prompts.batch import EncodedPrompt, EvaluationLoader
from frpo.evaluation.kl import FrozenModels
from frpo.evaluation.records import FOLDER, Row, quantities, read_file, record_path, write_rows
from frpo.evaluation.runner import FAILED, Evaluated, averages, complaints, run_suite
from frpo.evaluation.suite import Suite, check_name, naming
from frpo.foundation.durable import free_name
from frpo.models.sharding import gathered
from frpo.modules.evaluated import EvaluatedPolicy
from frpo.modules.precision import float32_by_default


class Evaluation(Callback):
    """Runs suites on a module's policy: before the first step, every so many optimiser steps, and after the last.

    Works with any module that has a ``policy_model`` and a ``tokenizer``. The evaluation of a step is on disk before
    the checkpoint of that step, and does not change what is trained. It is written to
    ``<output_dir>/evaluation/<suite>/step=<step>.jsonl`` (see :mod:`frpo.evaluation.records`) and its means go to every
    logger: ``eval/<suite>/<score>`` over completions with a value, ``eval/<suite>/<score>/failed``, a share of the
    completions the score did not abstain from, and ``eval/<suite>/kl/<name>/sequence`` and ``.../token``. A run resumed
    from a checkpoint logs the evaluation of its step again from the file; a fresh run moves an earlier ``evaluation``
    folder aside.

    Args:
        output_dir: folder of the run.
        suites: by name.
        every_n_train_steps: optimiser steps between evaluations; where a batch takes several steps and jumps over the
            multiple, the next step is evaluated. Null: none but the others asked for.
        at_steps: further optimiser steps to evaluate at.
        at_start: evaluate before the first step of a fresh run.

    Raises:
        ValueError: before the first step: a suite whose prompts, tasks, lengths or frozen models do not fit.
        FileNotFoundError: before the first step: a missing file.
    """

    def __init__(
        self,
        output_dir: str,
        suites: dict[str, Suite],
        every_n_train_steps: int | None = None,
        at_steps: list[int] | None = None,
        at_start: bool = True,
    ) -> None:
        if not suites:
            raise ValueError("Evaluation.suites: got none, expected at least one frpo.evaluation.suite.Suite by name")
        for name in suites:
            check_name("Evaluation.suites", name)
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(
                f"Evaluation.every_n_train_steps: got {every_n_train_steps}, expected at least 1 optimiser step, or "
                "null to evaluate at the start, at_steps and the end alone"
            )
        if any(step < 0 for step in at_steps or ()):
            raise ValueError(f"Evaluation.at_steps: got {at_steps}, expected optimiser steps, 0 or more")
        self.output_dir, self.suites = Path(output_dir), suites
        self.every_n_train_steps, self.at_steps, self.at_start = every_n_train_steps, at_steps or [], at_start
        self._prompts: dict[str, list[EncodedPrompt]] = {}
        self._frozen = FrozenModels()
        self._rewards_ready = False
        self._seen = 0
        self._done: int | None = None

    # Before the first step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts and check their tasks.

        Raises:
            ValueError, FileNotFoundError: as the class says.
        """
        if not _concerned(pl_module, stage):
            return
        if trainer.local_rank == 0:
            for name, suite in self.suites.items():
                with naming(name):
                    suite.prompts.prepare()
        trainer.strategy.barrier("evaluation prompts prepared")
        tokenizer: Any = pl_module.tokenizer
        self._prompts = {name: suite.load(name, tokenizer) for name, suite in self.suites.items()}
        for name in self.suites:
            self._loader(name, trainer, tokenizer.pad_token_id)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build what is heavy: rewards and frozen models."""
        self._build(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the policy that training starts from, or log again what a resumed run starts from."""
        step = self._seen = trainer.global_step
        if step == 0:
            self._move_aside(trainer)
            due = self.at_start or 0 in self.at_steps
        else:
            due = step in self.at_steps or (
                self.every_n_train_steps is not None and step % self.every_n_train_steps == 0
            )
        if step > 0 and self._on_disk(trainer, step):
            self._log_again(trainer, pl_module, step)
        elif due:
            self._evaluate(trainer, pl_module, step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a policy on its own."""
        if isinstance(pl_module, EvaluatedPolicy):
            self._build(pl_module)
            self._evaluate(trainer, pl_module, pl_module.step)

    # During and after training

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Evaluate where a step is due, or where this one is the last: its checkpoint is saved right after."""
        before, step = self._seen, trainer.global_step
        self._seen = step
        every = self.every_n_train_steps
        due = every is not None and step // every > before // every
        due = due or any(before < wanted <= step for wanted in self.at_steps)
        if due or 0 <= trainer.max_steps <= step:
            self._evaluate(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the last step where that was not done yet."""
        if self._done != trainer.global_step and not trainer.received_sigterm:
            self._evaluate(trainer, pl_module, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the frozen models."""
        self._frozen.clear()

    # Parts

    def _loader(self, name: str, trainer: Trainer, pad_token_id: int) -> EvaluationLoader:
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        with naming(name):
            return EvaluationLoader(
                self._prompts[name],
                batch_size=self.suites[name].batch_size,
                pad_token_id=pad_token_id,
                world_size=ranks["num_replicas"],
                rank=ranks["rank"],
            )

    def _build(self, module: Any) -> None:
        config = module.policy_model.config
        for name, suite in self.suites.items():
            suite.check_positions(name, self._prompts[name], getattr(config, "max_position_embeddings", None))
            for path in suite.kl_to.values():
                with naming(name):
                    policy = getattr(module, "policy", None)
                    self._frozen.load(path, policy, module.policy_model, module.device)
        if not self._rewards_ready:
            for suite in self.suites.values():
                for reward in suite.scores.values():
                    reward.setup(module.device)
            self._rewards_ready = True

    def _move_aside(self, trainer: Trainer) -> None:
        folder = self.output_dir / FOLDER
        if trainer.is_global_zero and folder.is_dir():
            folder.rename(free_name(folder))
        trainer.strategy.barrier("earlier evaluations moved aside")

    def _evaluate(self, trainer: Trainer, module: Any, step: int) -> None:
        policy = Evaluated(module.policy_model, module.tokenizer, step, module.device)
        metrics: dict[str, float] = {}
        for name, suite in self.suites.items():
            start = time.monotonic()
            loader = self._loader(name, trainer, policy.tokenizer.pad_token_id)
            with trainer.precision_plugin.forward_context(), float32_by_default(), gathered(policy.model):
                placed = run_suite(name, suite, policy, loader, self._frozen)
            means = averages(suite, (row for _, row in placed), policy.device).compute()
            metrics |= _named(name, means)
            rows = [row for _, row in sorted(_gather(placed), key=lambda item: (item[0], item[1]["sample"]))]
            if trainer.is_global_zero:
                write_rows(record_path(self.output_dir, name, step), rows)
                for complaint in complaints(suite, rows, means):
                    rank_zero_warn(f"suite {name!r}, step {step}: {complaint}")
                tqdm.write(_line(name, means, step, time.monotonic() - start))
        self._finish(trainer, metrics, step)

    def _log_again(self, trainer: Trainer, module: Any, step: int) -> None:
        metrics: dict[str, float] = {}
        for name, suite in self.suites.items():
            rows = read_file(record_path(self.output_dir, name, step)) if trainer.is_global_zero else []
            metrics |= _named(name, averages(suite, rows, module.device).compute())
        self._finish(trainer, metrics, step)

    def _finish(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        trainer.strategy.barrier("evaluation written and logged")
        self._done = step

    def _on_disk(self, trainer: Trainer, step: int) -> bool:
        """Whether every suite has a whole file of ``step`` from the same prompts and measures."""
        found = trainer.is_global_zero and all(self._is_whole(name, step) for name in self.suites)
        return bool(trainer.strategy.broadcast(found))

    def _is_whole(self, name: str, step: int) -> bool:
        path, suite = record_path(self.output_dir, name, step), self.suites[name]
        if not path.is_file():
            return False
        rows: list[Row] = read_file(path)
        expected = [(row.prompt.id, sample) for row in self._prompts[name] for sample in range(suite.samples)]
        same = [(row["prompt_id"], row["sample"]) for row in rows] == expected
        return same and all(list(quantities(row)) == suite.quantities for row in rows)


def _concerned(module: LightningModule, stage: str) -> bool:
    """Whether this run evaluates: a fit, or the test of a policy on its own."""
    if stage != "fit" and not isinstance(module, EvaluatedPolicy):
        return False
    if not (hasattr(module, "policy_model") and hasattr(module, "tokenizer")):
        raise ValueError(
            f"Evaluation: got a {type(module).__name__}, expected a module with a policy_model and a tokenizer, as "
            "frpo.modules.policy_optimization.PolicyOptimization has; remove the callback for this one"
        )
    return True


def _gather(placed: list[Any]) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return placed
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, placed)
    return [item for part in parts for item in part]


def _named(suite: str, means: dict[str, float]) -> dict[str, float]:
    return {f"eval/{suite}/{quantity}": value for quantity, value in means.items()}


def _line(name: str, means: dict[str, float], step: int, seconds: float) -> str:
    """``evaluation | step 40 | risky | safety 0.93 | 1.2s``; shares of failures only where there are some."""
    shown = [f"{key} {value:.3g}" for key, value in means.items() if value or not key.endswith(f"/{FAILED}")]
    return " | ".join([f"evaluation | step {step} | {name}", *shown, f"{seconds:.1f}s"])
