"""What memory is planned for: the job that a configuration's module, data and evaluation make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from frpo.data.demonstrations.module import SupervisedDataModule
from frpo.data.preferences.module import JudgedDataModule
from frpo.data.prompts.module import PromptDataModule
from frpo.evaluation.suite import Suite
from frpo.modules.policy_optimization import PolicyOptimization
from frpo.modules.supervised import SupervisedFineTuning
from frpo.plan.jobs import Job, PolicyJob, ScorerJob, SupervisedJob
from frpo.plan.phases import Rollout
from frpo.reward_modelling.module import RewardModelling
from frpo.rollouts.in_process import InProcessSampler
from frpo.rollouts.sampler import Sampler

# Lightning's names: whether arithmetic is in half precision beside the weights, and the type the weights are cast to.
PRECISIONS: dict[str, tuple[bool, torch.dtype | None]] = {
    **dict.fromkeys(("32-true", "32"), (False, None)),
    **dict.fromkeys(("bf16-mixed", "bf16"), (True, None)),
    "bf16-true": (False, torch.bfloat16),
    "16-true": (False, torch.float16),
    **dict.fromkeys(("64-true", "64"), (False, torch.float64)),
}


def read_job(module: Any, data: Any, *, precision: Any, suites: Mapping[str, Suite] | None = None) -> Job:
    """The job of a configuration's module and data at a Trainer's ``precision``.

    Raises ``ValueError`` for modules and precisions that are not planned.
    """
    name = str(precision)
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision: got {name!r}; memory is planned for {', '.join(PRECISIONS)}")
    autocast, cast = PRECISIONS[name]
    evaluated = suites or {}
    kl_to = sorted({path for suite in evaluated.values() for path in suite.kl_to.values()})
    scores = {f"{label}/{score}": judge for label, suite in evaluated.items() for score, judge in suite.scores.items()}
    return replace(_job(module, data, autocast, cast), kl_to=kl_to, scores=scores)


def _job(module: Any, data: Any, autocast: bool, cast: torch.dtype | None) -> Job:
    if type(module) is PolicyOptimization and isinstance(data, PromptDataModule):
        return _policy_job(module, data, autocast, cast)
    if type(module) is SupervisedFineTuning and isinstance(data, SupervisedDataModule):
        common = (module.policy, module.optimizer, module.micro_batch_size, autocast)
        return SupervisedJob(*common, data.batch_size, data.max_length, cast=cast)
    if type(module) is RewardModelling and isinstance(data, JudgedDataModule):
        common = (module.policy, module.optimizer, module.micro_batch_size, autocast)
        return ScorerJob(*common, module.scorer, data.batch_size, module.loss.responses, cast=cast)
    raise ValueError(
        f"got {type(module).__name__} with {type(data).__name__}; memory is planned for PolicyOptimization on prompts, "
        "SupervisedFineTuning on demonstrations and RewardModelling on judged responses. For others run a few steps: "
        "frpo fit --trainer.max_steps 3"
    )


def _policy_job(
    module: PolicyOptimization, data: PromptDataModule, autocast: bool, cast: torch.dtype | None
) -> PolicyJob:
    def rollout(name: str, sampler: Sampler, prompts: int, group_size: int) -> Rollout:
        if not isinstance(sampler, InProcessSampler):
            raise ValueError(f"got the sampler {type(sampler).__name__}; memory is planned for InProcessSampler")
        return Rollout(name, sampler, prompts, group_size, data.max_prompt_length)

    rollouts = [rollout("rollout", module.sampler, data.batch_size, module.group_size)]
    if data.sources["val"] is not None:
        rollouts.append(rollout("validation", module.val_sampler, data.val_batch_size, module.val_group_size))
    return PolicyJob(
        module.policy,
        module.optimizer,
        module.micro_batch_size,
        autocast,
        module.reference,
        module.kl,
        module.reward,
        tuple(rollouts),
        copies=0 if module.sam is None else 1,
        cast=cast,
    )
