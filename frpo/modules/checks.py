"""What policy optimisation refuses: configurations before the first step, and numbers that cannot be right."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from frpo.models.sharding import unwrapped
from frpo.objectives import FRPO
from frpo.types import RolloutBatch, ScoredBatch

if TYPE_CHECKING:
    from frpo.data.demonstrations.module import SupervisedBatch
    from frpo.modules.policy_module import PolicyModule
    from frpo.modules.policy_optimization import PolicyOptimization
    from frpo.modules.supervised import SupervisedFineTuning
    from frpo.reward_modelling.module import RewardModelling

# Mean |log ratio| between the sampler's forward pass and the trainer's, which differ in shapes, cache and rounding.
# float32 stays near 1e-6; in 16-bit arithmetic a token's log-probability moves by hundredths.
RATIO_TOLERANCE = {False: 1e-3, True: 0.1}
# Mean KL a token between policy and reference before the first update. The two run the same weights.
KL_TOLERANCE = {False: 1e-5, True: 1e-2}


FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


def check_policy(module: PolicyModule) -> None:
    """Refuse arguments that no module that trains a policy can work with. Reads no weights."""
    name = type(module).__name__
    if module.max_grad_norm is not None and not module.max_grad_norm > 0:
        raise ValueError(f"{name}.max_grad_norm must be > 0, got {module.max_grad_norm}")
    if module.lr_schedule.lower_bound() < 0:
        raise ValueError(
            f"{name}.lr_schedule is a factor on the learning rate and must be >= 0, got values down to "
            f"{module.lr_schedule.lower_bound()}"
        )
    if module.policy.adapter is None and module.policy.dtype in ("bfloat16", "float16"):
        rank_zero_warn(
            f"every weight of the policy trains in {module.policy.dtype}, where small updates are rounded away: write "
            "policy.init_args.dtype: float32 with trainer.precision: bf16-mixed, or give the policy an adapter"
        )


def check_supervised(module: SupervisedFineTuning | RewardModelling) -> None:
    """Refuse arguments that training on given rows cannot work with. Reads no weights."""
    for name, value, least in (("micro_batch_size", module.micro_batch_size, 1), ("seed", module.seed, 0)):
        if value < least:
            raise ValueError(f"{type(module).__name__}.{name} must be >= {least}, got {value}")
    check_policy(module)


def check_configuration(module: PolicyOptimization) -> None:
    """Refuse arguments that cannot work together. Reads no weights."""
    for name, value, least in (
        ("group_size", module.group_size, 2),
        ("val_group_size", module.val_group_size, 1),
        ("micro_batch_size", module.micro_batch_size, 1),
        ("epochs_per_rollout", module.epochs_per_rollout, 1),
        ("seed", module.seed, 0),
    ):
        if value < least:
            why = ": a completion is compared with the others of its group" if name == "group_size" else ""
            raise ValueError(f"PolicyOptimization.{name} must be >= {least}, got {value}{why}")
    if not module.rho > 0:
        raise ValueError(f"PolicyOptimization.rho must be > 0, got {module.rho}")
    if not 0 <= module.max_failure_rate <= 1:
        raise ValueError(f"PolicyOptimization.max_failure_rate must be in [0, 1], got {module.max_failure_rate}")
    check_policy(module)
    if module.policy.adapter is not None and module.policy.adapter.dropout > 0:
        raise ValueError(
            f"PolicyOptimization.policy.adapter.dropout must be 0, got {module.policy.adapter.dropout}: sampling and "
            "training have to see one policy, or the ratios are not 1 on-policy. Dropout is for "
            "frpo.modules.supervised.SupervisedFineTuning"
        )
    if module.lam_schedule is not None:
        _check_lambda(module)
    if module.on_reward_error not in ("raise", "failed"):
        raise ValueError(
            f"PolicyOptimization.on_reward_error: got {module.on_reward_error!r}, expected raise or failed"
        )
    _check_sampler(module)
    if module.reference is None and not module.kl.is_off:
        raise ValueError(
            "PolicyOptimization.reference is null but kl.beta is not 0 throughout; write `kl: {class_path: "
            "frpo.penalty.KLPenalty, init_args: "
            "{beta: 0}}`, or a reference such as frpo.models.reference.AdapterDisabled"
        )


def _check_lambda(module: PolicyOptimization) -> None:
    assert module.lam_schedule is not None
    if not isinstance(module.objective, FRPO):
        raise ValueError(
            f"PolicyOptimization.lam_schedule schedules lambda, which {type(module.objective).__name__} does not have; "
            "remove it or use frpo.objectives.FRPO"
        )
    if not module.lam_schedule.lower_bound() > 0:
        raise ValueError(
            "PolicyOptimization.lam_schedule must stay > 0, got values down to "
            f"{module.lam_schedule.lower_bound()} (a warm-up starts at 0); start and end above 0"
        )


def _check_sampler(module: PolicyOptimization) -> None:
    if not module.sampler.temperature > 0:
        raise ValueError(
            f"PolicyOptimization.sampler.temperature must be > 0 in training, got {module.sampler.temperature}: greedy "
            "completions of a group are all equal; set it in `val_sampler` for greedy validation"
        )
    if module.sampler.truncates and (module.epochs_per_rollout > 1 or module.sam is not None):
        moved, instead = (
            ("sam", "Leave out sam")
            if module.sam is not None
            else (f"epochs_per_rollout={module.epochs_per_rollout}", "Write epochs_per_rollout: 1")
        )
        raise ValueError(
            f"PolicyOptimization: got {moved} with top_p={module.sampler.top_p}, top_k={module.sampler.top_k}; once "
            "the weights have moved, the set of tokens that sampling kept is unknown and the ratios would be those of "
            f"another policy. {instead}, or write top_p: 1.0 and top_k: null"
        )


def check_run(module: PolicyOptimization) -> None:
    """Refuse what only the loaded model and the trainer show."""
    check_precision(module)
    check_positions(module)
    check_forward(module.policy_model)


def check_supervised_run(module: SupervisedFineTuning) -> None:
    """Refuse what only the loaded model and the trainer show."""
    check_precision(module)
    check_forward(module.policy_model)
    limit = getattr(module.policy_model.config, "max_position_embeddings", None)
    longest = getattr(getattr(module.trainer, "datamodule", None), "longest", 0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a demonstration has {longest} tokens, but {module.policy.path!r} has positions for {limit}; write "
            f"data.init_args.max_length: {limit} or less"
        )


def check_precision(module: PolicyModule) -> None:
    """Refuse a precision that does not fit several backward passes a step; warn of one that trains in half."""
    precision = str(module.trainer.precision)
    if precision in ("bf16-true", "16-true"):
        rank_zero_warn(
            f"Trainer.precision: {precision} holds all that trains in half precision, an adapter too, where small "
            "updates are rounded away: write bf16-mixed, and policy.init_args.dtype: bfloat16 for a frozen base"
        )
    if precision == "16-mixed":
        raise ValueError(
            "Trainer.precision: got 16-mixed, whose loss scaling does not fit several backward passes a step; write "
            "bf16-mixed"
        )


def check_forward(model: Any) -> None:
    """Refuse a model that cannot be told positions, or which logits are wanted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else unwrapped(model)
    missing = [name for name in FORWARD_ARGUMENTS if name not in inspect.signature(base.forward).parameters]
    if missing:
        raise ValueError(
            f"{type(base).__name__}.forward takes no {' and no '.join(missing)}, which training on left-padded prompts "
            "needs; choose a decoder-only model of current transformers"
        )


def check_positions(module: PolicyOptimization) -> None:
    """Refuse prompts and completions that together are longer than the model has positions for."""
    limit = getattr(module.policy_model.config, "max_position_embeddings", None)
    prompt = getattr(getattr(module.trainer, "datamodule", None), "max_prompt_length", 0)
    longest = max(module.sampler.max_new_tokens, module.val_sampler.max_new_tokens)
    if limit is not None and prompt + longest > limit:
        raise ValueError(
            f"max_prompt_length {prompt} + max_new_tokens {longest} = {prompt + longest} tokens, but "
            f"{module.policy.path!r} "
            f"has positions for {limit}; lower data.init_args.max_prompt_length or sampler.init_args.max_new_tokens"
        )


def check_finite(coefficients: Tensor, scored: ScoredBatch) -> None:
    """Raise where the objective's coefficients [P, G] are not finite, naming the prompts."""
    bad = ~torch.isfinite(coefficients).all(-1)
    if bad.any():
        prompts = scored.rollout.prompts.prompts
        named = ", ".join(prompts[i].id for i in bad.nonzero().flatten().tolist())
        raise FloatingPointError(
            f"the loss of prompt(s) {named} is not finite (rewards {scored.rewards[bad].tolist()}); the weights were "
            "not changed"
        )


def check_loss(loss: Tensor, rollout: RolloutBatch, rows: Tensor) -> None:
    """Raise where the loss of a micro-batch is not finite, naming its prompts."""
    if not bool(torch.isfinite(loss)):
        G = rollout.mask.shape[1]
        named = ", ".join(sorted({rollout.prompts.prompts[i // G].id for i in rows.tolist()}))
        raise FloatingPointError(
            f"the loss of a micro-batch with prompt(s) {named} is {loss.item()}: the model's logits are not finite; "
            "the weights were not changed. Lower the learning rate, or use precision bf16-mixed or 32-true"
        )


def check_supervised_loss(loss: Tensor, batch: SupervisedBatch) -> None:
    """Raise where the loss of a micro-batch is not finite, naming its demonstrations."""
    if not bool(torch.isfinite(loss)):
        named = ", ".join(batch.ids)
        raise FloatingPointError(
            f"the loss of a micro-batch with demonstration(s) {named} is {loss.item()}: the model's logits are not "
            "finite; the weights were not changed. Lower the learning rate, or use precision bf16-mixed or 32-true"
        )


def check_gradient(norm: Tensor) -> None:
    """Raise where the norm of the gradient over all trainable weights is not finite."""
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(
            f"the gradient norm is {norm.item()} though the loss is finite; the weights were not changed. Lower the "
            "learning rate, or use precision bf16-mixed or 32-true"
        )


def check_ratios(gap: Tensor, *, half: bool) -> None:
    """On-policy every ratio is 1: ``gap`` [P, G] is the mean |log ratio| of sampler and trainer a completion."""
    worst, tolerance = gap.mean().item(), RATIO_TOLERANCE[half]
    if not worst <= tolerance:
        raise RuntimeError(
            f"self-check before the first update: log-probabilities of the sampler and of the training pass differ "
            f"by {worst:.3g} "
            f"a token, expected at most {tolerance}. The two must see one policy: look for a difference in masks, "
            "positions, dropout, temperature or precision between generation and training"
        )


def check_initial_kl(kl: Tensor, *, half: bool) -> None:
    """Before the first update policy and reference are one: ``kl`` [P, G] is the mean token KL a completion."""
    worst, tolerance = kl.abs().mean().item(), KL_TOLERANCE[half]
    if not worst <= tolerance:
        raise RuntimeError(
            f"self-check before the first update: KL to the reference is {worst:.3g} nats a token, expected at most "
            f"{tolerance}, "
            "since the policy starts at the reference. Look for a reference of other weights, precision or dropout"
        )


def check_checkpoint(checkpoint: dict[str, Any], module: PolicyModule) -> None:
    """Refuse a checkpoint whose weights or schedules are not those of this configuration."""
    if "frpo" not in checkpoint:
        raise ValueError(
            "the checkpoint holds no `frpo` entry, so it was not written by policy optimisation or fine-tuning; give a "
            "file from a run's checkpoints folder to --ckpt_path, and a model directory to `policy.init_args.path`"
        )
    expected = {name: tuple(shape) for name, shape in module.shapes.items()}
    found = {name: tuple(shape) for name, shape in _saved_shapes(checkpoint).items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint does not fit this configuration: {len(differing)} of {len(expected)} trainable tensors "
            "differ, the "
            f"first {name}: got {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}. Resume with "
            "the policy and adapter of the run that wrote it (its config.yaml)"
        )
    _check_same_policy(checkpoint["frpo"].get("policy"), module.policy.description())
    missing = sorted(module.schedules().keys() ^ checkpoint["frpo"]["schedules"].keys())
    if missing:
        raise ValueError(
            f"the checkpoint has schedules {sorted(checkpoint['frpo']['schedules'])}, this configuration "
            f"{sorted(module.schedules())}; resume with the configuration of the run"
        )


def _saved_shapes(checkpoint: dict[str, Any]) -> dict[str, Any]:
    # A strategy that shards weights takes them out of the checkpoint before anyone else sees it.
    if "state_dict" not in checkpoint:
        if "shapes" not in checkpoint["frpo"]:
            raise ValueError(
                "the checkpoint was written before frpo could shard weights; resume it for a step without FSDP first, "
                "and give the checkpoint of that step"
            )
        shapes: dict[str, Any] = checkpoint["frpo"]["shapes"]
        return shapes
    return {name: value.shape for name, value in checkpoint["state_dict"].items()}


def _check_same_policy(saved: dict[str, Any] | None, present: dict[str, Any]) -> None:
    """Weights that fit may still belong to another function: another base, or another scale of the adapter."""
    if saved is None:
        return
    before, now = (policy["init_args"].get("adapter") or {} for policy in (saved, present))
    if any(before.get(key) != now.get(key) for key in ("r", "alpha", "target_modules")):
        raise ValueError(
            f"the checkpoint was trained with the adapter {before}, this configuration has {now}; resume with the "
            "adapter of the run"
        )
    for key in ("path", "revision", "tokenizer_path"):
        old, new = saved["init_args"].get(key), present["init_args"].get(key)
        if old != new:
            rank_zero_warn(f"the checkpoint was trained on policy {key} {old!r}, this run continues on {new!r}")
