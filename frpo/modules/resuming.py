"""What a checkpoint must hold for a configuration to go on from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def check_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    shapes: Mapping[str, Sequence[int]],
    policy: dict[str, Any],
    schedules: Collection[str],
) -> None:
    """Refuse a checkpoint of other weights or schedules.

    ``shapes`` are those of the weights that train, ``policy`` the description of the present one, ``schedules`` the
    names of what is scheduled.
    """
    if "frpo" not in checkpoint:
        raise ValueError(
            "the checkpoint holds no `frpo` entry, so it was not written by policy optimisation or fine-tuning; give a "
            "file from a run's checkpoints folder to --ckpt_path, and a model directory to `policy.init_args.path`"
        )
    saved = checkpoint["frpo"]
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    found = {name: tuple(shape) for name, shape in _saved_shapes(checkpoint).items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint does not fit this configuration: {len(differing)} of {len(expected)} trainable tensors "
            f"differ, the first {name}: got {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}. "
            "Resume with the policy and adapter of the run that wrote it (its config.yaml)"
        )
    _check_same_policy(saved.get("policy"), policy)
    if set(schedules) != saved["schedules"].keys():
        raise ValueError(
            f"the checkpoint has schedules {sorted(saved['schedules'])}, this configuration {sorted(schedules)}; "
            "resume with the configuration of the run"
        )


def _saved_shapes(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    # A strategy that shards weights takes them out of the checkpoint before anyone else sees it.
    if "state_dict" in checkpoint:
        return {name: value.shape for name, value in checkpoint["state_dict"].items()}
    if "shapes" not in checkpoint["frpo"]:
        raise ValueError(
            "the checkpoint was written before frpo could shard weights; resume it for a step without FSDP first, "
            "and give the checkpoint of that step"
        )
    shapes: Mapping[str, Any] = checkpoint["frpo"]["shapes"]
    return shapes


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
