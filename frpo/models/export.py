"""A policy as a Hugging Face directory, read back before it counts as saved."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from frpo import __version__
from frpo.models.saving import (
    logit_difference,
    new_directory,
    probe_logits,
    require_free_directory,
    require_reloaded,
    require_space,
    save_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "frpo_export.json"
ADAPTER = "default"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Kind = Literal["full", "adapter", "merged"]
# Adding the adapter to the weights reorders float32 sums; through 30 layers that came to 1e-5 of the largest logit.
MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, in parameters and bytes, and how it read back.

    ``rounding`` is the largest difference between the logits of the policy and of the directory, over the policy's
    largest logit: what storing it in another type, or merged, changed. What was written and what was read back agree.
    """

    directory: Path
    kind: Kind
    dtype: str
    parameters: int
    size: int
    rounding: float


@dataclass(frozen=True)
class _Written:
    """Weights on disk: their type and number, and the logits they give before they are read back."""

    dtype: torch.dtype
    parameters: int
    logits: Tensor


def export_policy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    checkpoint: str | None = None,
    step: int | None = None,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Write a policy to the new directory ``out_dir``, load it from there and compare the logits.

    All weights give a model directory. An adapter gives a PEFT directory, or with ``merge`` a model directory with
    the adapter added to the weights in float32. ``model`` itself is not changed. Its weights must be whole, not
    sharded; of several processes, one alone may call it.

    Args:
        model: a causal LM, or a PeftModel with one active adapter.
        tokenizer: saved beside the weights as it is.
        out_dir: must be new or empty.
        merge: add the adapter to the weights.
        dtype: float32, bfloat16 or float16; None keeps the type the weights have.
        checkpoint: file name of the checkpoint, for the record.
        step: optimiser steps the policy was trained, for the record.
        trust_remote_code: run modelling code that comes with the weights when they are read back.

    Raises:
        FileExistsError: if ``out_dir`` holds something already.
        OSError: if it cannot be written; nothing is left behind.
        ValueError: on ``merge`` without an adapter, an unknown ``dtype``, or weights that do not read back, merge or
            fit the type; nothing is left behind.
    """
    out = Path(out_dir)
    kind = _kind(model, merge)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"export dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}, or null to keep it")
    require_free_directory(out)
    trained = probe_logits(model)
    if not bool(torch.isfinite(trained).all()):
        raise ValueError("the policy's logits are not finite, so its weights are of no use; take an earlier checkpoint")
    with new_directory(out) as staging:
        write = _write_adapter if kind == "adapter" else _write_model
        written = write(model, staging, None if dtype is None else DTYPES[dtype])
        save_tokenizer(tokenizer, staging)
        reload_difference = require_reloaded(
            written.logits, probe_logits(_reload(staging, kind, model, trust_remote_code))
        )
        record: dict[str, Any] = {
            "kind": kind,
            "dtype": str(written.dtype).removeprefix("torch."),
            "checkpoint": checkpoint,
            "step": step,
            "parameters": written.parameters,
            "rounding": logit_difference(trained, written.logits),
            "reload_difference": reload_difference,
            "versions": {"frpo": __version__} | {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in staging.iterdir())
    return ExportReport(out, kind, record["dtype"], written.parameters, size, record["rounding"])


def _kind(model: Any, merge: bool) -> Kind:
    if not hasattr(model, "peft_config"):
        if merge:
            raise ValueError(
                "merge: this policy trained all its weights and has no adapter to merge; leave --merge away"
            )
        return "full"
    if model.active_adapters != [ADAPTER]:
        raise ValueError(
            f"active adapters: got {model.active_adapters}, expected [{ADAPTER!r}], the one a policy trains"
        )
    return "merged" if merge else "adapter"


def _write_model(model: Any, folder: Path, dtype: torch.dtype | None) -> _Written:
    stored = dtype or model.dtype
    parameters = sum(p.numel() for p in model.parameters())
    require_space(folder, parameters * stored.itemsize)
    if hasattr(model, "peft_config"):
        model = _cast(_merged(model), stored)
        parameters = sum(p.numel() for p in model.parameters())
    elif stored != model.dtype:
        model = _cast(copy.deepcopy(model), stored)
    logits = probe_logits(model)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"the policy's logits overflow in {stored}; nothing was kept. Export it in float32 or bfloat16"
        )
    model.save_pretrained(folder)
    return _Written(stored, parameters, logits)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    # Parameters alone: from_pretrained keeps the rotary frequencies in float32, and Module.to would round them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _merged(model: Any) -> Any:
    # A copy, as merging changes the weights; float32 or wider, as bfloat16 would round a small update away.
    wide = _cast(copy.deepcopy(model), torch.promote_types(model.dtype, torch.float32))
    apart = probe_logits(wide)
    merged = wide.merge_and_unload()
    difference = logit_difference(apart, probe_logits(merged))
    if not difference <= MERGE_TOLERANCE:
        raise ValueError(
            f"merging changed the logits by {difference:.1e} of the largest, expected at most {MERGE_TOLERANCE:.0e}; "
            "nothing was kept. An adapter on tied weights (lm_head) cannot be merged: export it without --merge"
        )
    return merged


def _write_adapter(model: Any, folder: Path, dtype: torch.dtype | None) -> _Written:
    weights = {name: p.detach() for name, p in model.named_parameters() if ADAPTER in name.split(".")}
    stored = dtype or next(iter(weights.values())).dtype
    parameters = sum(weight.numel() for weight in weights.values())
    require_space(folder, parameters * stored.itemsize)
    state = {name: weight.to(stored) for name, weight in weights.items()}
    # The base model is not saved along, so its embeddings are not either.
    model.save_pretrained(folder, selected_adapters=[ADAPTER], state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    rounded = {name: weight.to(weights[name].dtype) for name, weight in state.items()}
    return _Written(stored, parameters, probe_logits(model, rounded))


def _reload(folder: Path, kind: Kind, model: Any, trust_remote_code: bool) -> Any:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    # The arithmetic of the policy, or equal weights would not give equal logits.
    attention = model.config._attn_implementation
    loader, dtype = (AutoPeftModelForCausalLM, model.dtype) if kind == "adapter" else (AutoModelForCausalLM, "auto")
    loaded: Any = loader.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
    )
    return loaded.to(model.device)
