"""Reading a run's checkpoint back as its policy: plain data only, and every weight accounted for."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frpo.foundation.class_names import with_full_paths
from frpo.foundation.errors import ConfigError, clipped
from frpo.foundation.yaml_files import read_mapping
from frpo.models.policy import Policy

PREFIX = "policy_model."
NAMES_SHOWN = 3


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy as trained up to ``step`` optimiser steps: its description, and the model with the trained weights."""

    policy: Policy
    model: nn.Module
    step: int


def load_policy(path: Path, config: Path | None = None, trust_remote_code: bool = False) -> LoadedPolicy:
    """Rebuild the policy of a run and load the weights it trained.

    The description of the policy is taken from ``config`` where that is given, else from the checkpoint itself
    (``checkpoint["frpo"]["policy"]``), else from ``config.yaml`` in the run's folder, one above the checkpoint's.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if the checkpoint is damaged, holds more than plain data, or does not fit the policy.
    """
    checkpoint = read_checkpoint(path)
    policy = build_policy(_description(checkpoint, path, config))
    if policy.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"the policy {policy.path!r} wants to run code that comes with its weights (trust_remote_code); "
            "pass --trust_remote_code if you trust its author"
        )
    policy.prepare()
    model = policy.load()
    load_trained(model, checkpoint["state_dict"], path.name)
    step = checkpoint.get("global_step", 0)
    return LoadedPolicy(policy, model, step if isinstance(step, int) else 0)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, mapped from disk on the CPU; only tensors and plain containers are accepted.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, holds other Python objects, or is not a checkpoint of a run.
    """
    if path.is_dir():
        raise ValueError(
            f"checkpoint {path} is a directory, expected one file; a sharded checkpoint must be consolidated first "
            "(train with save_distributed_checkpoint: false)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds the Python object {found[1]}" if found else "is damaged"
        raise ValueError(
            f"checkpoint {path.name} {what}; expected tensors and plain containers alone, so it was refused unread, "
            "as loading anything else could run code"
        ) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {path.name} is damaged or not a checkpoint ({reason}); take another") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} is not the checkpoint of a run: it has no state_dict of tensors")
    return checkpoint


def _description(checkpoint: Mapping[str, Any], path: Path, config: Path | None) -> Any:
    record = checkpoint.get("frpo")
    own = record.get("policy") if isinstance(record, Mapping) else None
    if config is None and own is not None:
        return own
    file = config or path.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"no configuration at {file}, needed to rebuild the policy; give the run's config.yaml with --config FILE"
        )
    try:
        found: Any = read_mapping(file)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    for key in ("model", "init_args", "policy"):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        raise ValueError(f"{file} has no model.init_args.policy; expected the config.yaml that the run wrote")
    return found


def build_policy(description: Any) -> Policy:
    """The policy of ``{"class_path": ..., "init_args": {...}}``, without loading its model.

    A class of frpo may be named as it was when the description was written.

    Raises:
        ValueError: if the description does not make a :class:`Policy`.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=Policy, required=True)
    try:
        policy = parser.instantiate(parser.parse_object({"policy": with_full_paths(description)})).policy
    except Exception as error:  # the description comes from a file, and the parser lets more than ArgumentError through
        reason = clipped(str(error), 1000)
        raise ValueError(f"the policy of the run cannot be rebuilt: {type(error).__name__}: {reason}") from error
    assert isinstance(policy, Policy)
    return policy


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the trained weights of a checkpoint into ``model``: each trainable parameter once, and nothing else.

    ``state`` names them ``policy_model.<name>``; a tied weight may come under any of its names.

    Raises:
        ValueError: naming the weights that are missing, unexpected or of another shape.
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    given = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    foreign = [name for name in state if not name.startswith(PREFIX)]
    unexpected = sorted(foreign + [name for name in given if name not in parameters])
    loaded = {id(parameters[name]) for name in given if name in parameters}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = sorted(name for name in trainable if id(parameters[name]) not in loaded)
    shapes = [
        f"{name}: got {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
        for name, tensor in given.items()
        if name in parameters and tensor.shape != parameters[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(_mismatch(source, missing, unexpected, shapes, list(parameters)))
    with torch.no_grad():
        for name, tensor in given.items():
            parameters[name].copy_(tensor)


def _mismatch(source: str, missing: list[str], unexpected: list[str], shapes: list[str], parameters: list[str]) -> str:
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [
        f"{len(names)} {what} ({'; '.join(names[:NAMES_SHOWN])}{'; ...' if len(names) > NAMES_SHOWN else ''})"
        for what, names in lists.items()
        if names
    ]
    return f"checkpoint {source} does not fit the policy: weights {', '.join(parts)}. {_reason(unexpected, parameters)}"


def _reason(unexpected: list[str], parameters: list[str]) -> str:
    adapted = any("lora_" in name for name in parameters)
    if any("lora_" in name for name in unexpected) and not adapted:
        return "The run trained an adapter, and this configuration has none: give the run's own with --config"
    if adapted and unexpected and not any("lora_" in name for name in unexpected):
        return "The run trained all weights, and this configuration has an adapter: give the run's own with --config"
    return "The configuration names another base model or adapter than the run had: give the run's own with --config"
