"""What every module that trains a policy shares: building it, optimiser steps, metrics, checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any, ClassVar, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from frpo.foundation import require
from frpo.models import sharding
from frpo.models.policy import Policy, trainable_names
from frpo.modules.averages import Averages
from frpo.modules.numerics import check_gradient
from frpo.modules.optimizer_names import by_name, by_number
from frpo.modules.resuming import check_checkpoint
from frpo.modules.strategy import check_flat_optimizer, check_strategy, is_sharded
from frpo.schedules import Constant, Schedule
from frpo.types import DataFacts, Stage


class PolicyModule(L.LightningModule):
    """A policy that takes its own optimiser steps.

    A subclass has a ``training_step`` that calls :meth:`_backward` for every micro-batch, then
    :meth:`_optimizer_step`, then :meth:`_log_training`. Its ``setup`` calls this one
    and builds ``train_averages``, with ``grad_norm``, ``lr`` and ``seconds_...`` for each phase among the names, and
    ``eval_averages``.

    Args:
        policy: the model that trains.
        optimizer: takes the trainable parameters.
        lr_schedule: factor on the optimiser's learning rate by optimiser step; null leaves it constant.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        seed: of everything that is random here.
    """

    policy_model: Any
    reference_model: Any
    train_averages: Averages
    eval_averages: Averages
    shapes: dict[str, list[int]]
    """Of the weights that train, by name."""
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics on the progress bar."""

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable,
        lr_schedule: Schedule | None,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        require.number(f"{name}.max_grad_norm", max_grad_norm, above=0, finite=False)
        require.seed(f"{name}.seed", seed)
        self.automatic_optimization = False
        self.strict_loading = False
        self.policy, self.optimizer, self.max_grad_norm, self.seed = policy, optimizer, max_grad_norm, seed
        self.lr_schedule = Constant(1.0) if lr_schedule is None else lr_schedule
        lowest = self.lr_schedule.lower_bound()
        require.number(f"{name}.lr_schedule", lowest, at_least=0, hint="it is a factor on the learning rate")
        if policy.adapter is None and policy.dtype in ("bfloat16", "float16"):
            rank_zero_warn(
                f"every weight of the policy trains in {policy.dtype}, where small updates are rounded away: write "
                "policy.init_args.dtype: float32 with trainer.precision: bf16-mixed, or give the policy an adapter"
            )
        self.policy_model = self.reference_model = None
        self.shapes = {}
        self.facts = DataFacts()

    # Construction

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; reading it loads no weights."""
        return self.policy.tokenizer

    def prepare_data(self) -> None:
        """Make the policy's files exist, once per node."""
        self.policy.prepare()

    def on_data_read(self, facts: DataFacts) -> None:
        """Keep what the data module says of its rows."""
        self.facts = facts

    def setup(self, stage: str) -> None:
        """Refuse a strategy that would train something else."""
        check_strategy(self.trainer)

    @property
    def positions(self) -> int | None:
        """Positions that the loaded model has; None where it names no limit."""
        limit: int | None = getattr(self.policy_model.config, "max_position_embeddings", None)
        return limit

    def configure_model(self) -> None:
        """Load the policy; a fresh adapter's weights are a function of the seed. Under FSDP, shard what was loaded."""
        if self.policy_model is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.load_models()
        # Read now: FSDP1 leaves a rank with pieces of weights, in one dimension.
        self.shapes = {name: list(self.get_parameter(name).shape) for name in sorted(trainable_names(self))}
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        self.policy_model = sharding.shard(self.policy_model, mesh)
        if self.reference_model is not None:
            self.reference_model = sharding.shard(self.reference_model, mesh)
        self.to(next(self.policy_model.parameters()).device)  # FSDP1 has moved the weights, and Lightning would not

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move, and cast the weights alone: a model in half precision computes its positions in float32.

        That is how ``from_pretrained`` loads it, and how an exported policy will be read.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            self._apply(lambda tensor: tensor.to(dtype) if isinstance(tensor, Parameter) else tensor)
        return self if device is None else super().to(device)

    def load_models(self) -> None:
        """Set ``policy_model``, and ``reference_model`` where there is one."""
        self.policy_model = self.policy.load()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser over the trainable parameters.

        Raises:
            ValueError: one that goes by the shapes of weights under FSDP1, which does not keep them.
        """
        optimizer = self.optimizer([p for p in self.policy_model.parameters() if p.requires_grad])
        if sharding.unwrapped(self.policy_model) is not self.policy_model:
            check_flat_optimizer(optimizer)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    # Training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the global generators from (seed, step, rank): what uses them resumes, validation or not."""
        seed = int(np.random.SeedSequence((self.seed, self.global_step, self.global_rank)).generate_state(1)[0])
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Reduce gradients over ranks in the last micro-batch of a step only."""
        strategy = self.trainer.strategy
        accumulate = isinstance(strategy, ParallelStrategy) and not last
        with (
            sharding.reduce_in_backward(self.policy_model, last),
            strategy.block_backward_sync() if accumulate else nullcontext(),  # type: ignore[attr-defined]
        ):
            self.manual_backward(loss)

    def _optimizer_step(self) -> None:
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_schedule.value(self.global_step)
        moved = [p for p in self.policy_model.parameters() if p.grad is not None]
        norm = sharding.total_norm(self.policy_model, (p.grad for p in moved))
        check_gradient(norm)
        self.train_averages.update("grad_norm", norm)
        self.train_averages.update("lr", optimizer.param_groups[0]["lr"])
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(moved, self.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        mean: Tensor = self.trainer.strategy.reduce(value.to(self.device), reduce_op="mean")
        return mean

    # Metrics

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.train_averages.update(f"seconds_{name}", perf_counter() - start)

    def _log_training(self, step: int) -> None:
        """Log the averages since the last time metrics were logged; ``step`` is the step before the update.

        They go to the loggers here: Lightning would log them after the checkpoint of the step, and a kill in between
        would lose them. Lightning gets them for the progress bar and for callbacks.
        """
        batches = self.trainer.fit_loop.total_batch_idx + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every > 0 and batches % every == 0
        if due or batches == 1:  # the first is shown at once
            means = {f"train/{name}": value for name, value in self.train_averages.compute().items()}
            for name, value in means.items():
                shown = name.removeprefix("train/") in self.shown
                self.log(name, value, prog_bar=shown, logger=False, rank_zero_only=True)
            if due:
                for logger in self.loggers:
                    # The axis of metrics is the optimiser step before the update, as in the completion table.
                    logger.log_metrics(means, step)
        if due:
            self.train_averages.reset()

    def _log_evaluation(self, stage: Stage, prog_bar: bool = False) -> None:
        """Log the averages over all held-out rows and ranks."""
        for name, value in self.eval_averages.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=prog_bar, rank_zero_only=True)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.global_step), rank_zero_only=True)

    # Checkpoints

    def schedules(self) -> dict[str, Schedule]:
        """The schedules in use, by what they set."""
        return {"lr": self.lr_schedule}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable weights alone: what is frozen is rebuilt from the configuration."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in self.shapes}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the schedules, and the policy's description for a later export."""
        schedules = {name: schedule.state_dict() for name, schedule in self.schedules().items()}
        # Those of all ranks, for rank 0 to go on from, whatever their number then.
        averages = {
            name: self.trainer.strategy.reduce(getattr(self.train_averages, name).clone(), reduce_op="sum").tolist()
            for name in ("total", "count")
        }
        checkpoint["frpo"] = {
            "schedules": schedules,
            "policy": self.policy.description(),
            "averages": averages,
            "shapes": self.shapes,
        }
        names = self._numbered()
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [by_name(state, names) for state in checkpoint["optimizer_states"]]

    @property
    def sharded(self) -> bool:
        """Whether the strategy cuts weights over ranks."""
        return is_sharded(self.trainer)

    def _numbered(self) -> list[str]:
        """Names of the weights by the number an optimiser's state has for them.

        All weights of the module where they are sharded, else those that train, by the optimiser's own groups.
        """
        if self.sharded:
            return [sharding.clean(name) for name, _ in self.named_parameters()]
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        # A checkpoint is read before the strategy has its optimiser.
        optimizer = self.trainer.optimizers[0] if self.trainer.optimizers else self.configure_optimizers()
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; continue the schedules."""
        check_checkpoint(
            checkpoint, shapes=self.shapes, policy=self.policy.description(), schedules=self.schedules().keys()
        )
        for name, schedule in self.schedules().items():
            schedule.load_state_dict(checkpoint["frpo"]["schedules"][name])
        if "optimizer_states" in checkpoint and not self.sharded:  # else the strategy has read them by name
            names = self._numbered()
            checkpoint["optimizer_states"] = [by_number(state, names) for state in checkpoint["optimizer_states"]]
        if self.global_rank == 0:
            for name, values in checkpoint["frpo"]["averages"].items():
                if len(values) == len(self.train_averages.names):  # else the tasks are other ones: begin afresh
                    setattr(self.train_averages, name, torch.tensor(values, device=self.train_averages.total.device))
