"""The phases of a training step, run without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frpo.plan.blank import BlankModel
from frpo.plan.plan import Line, Phase, trainable
from frpo.plan.tracing import tracing
from frpo.rollouts.in_process import InProcessSampler


@dataclass(frozen=True)
class Rollout:
    """A sampler at work: ``prompts`` prompts of ``prompt_tokens`` tokens, ``group_size`` completions of each."""

    name: str
    sampler: InProcessSampler
    prompts: int
    group_size: int
    prompt_tokens: int

    @property
    def at_once(self) -> int:
        """Prompts whose groups are decoded together."""
        limit = self.sampler.max_sequences
        return self.prompts if limit is None else min(self.prompts, max(1, limit // self.group_size))


def rollout_phase(model: Any, rollout: Rollout, *, autocast: bool) -> Phase:
    """The peak of sampling: at the last token, when the cache is longest, or over the prompts."""
    p, L, sampler = rollout.at_once, rollout.prompt_tokens, rollout.sampler
    n, total = p * rollout.group_size, L + sampler.max_new_tokens
    training = model.training
    model.eval()
    with tracing([model], autocast=autocast) as live, torch.no_grad():
        _prefill(model, p, L)
        prompts = live.peak
        before = live.now
        out = _prefill(model, n, total - 1)
        cache = live.now - before - out.logits.untyped_storage().nbytes()
        live.restart()
        step = model(
            input_ids=_ids(n, 1), attention_mask=_ids(n, total), position_ids=_ids(n, 1),
            past_key_values=out.past_key_values, use_cache=True,
        )  # fmt: skip
        sampler._draw(step.logits[:, -1], torch.zeros(n, dtype=torch.float64))
    model.train(training)
    peak = max(live.peak, prompts)
    what = f"{n} sequences of {L} + {sampler.max_new_tokens} tokens"
    limit = "" if sampler.max_sequences is None else f", max_sequences {sampler.max_sequences}"
    return Phase(
        rollout.name,
        (
            Line("KV cache", cache, f"{what} ({p} prompts x {rollout.group_size}{limit}), at its longest"),
            Line("workspace", peak - cache, "one token of each, logits and drawing included; or the prompts"),
        ),
    )


def reward_phase(scorer: BlankModel, completions: int) -> Phase:
    """The forward pass of a reward's model over its largest batch."""
    rows = min(scorer.rows, completions)
    with tracing([scorer.model], autocast=False) as live, torch.no_grad():
        scorer.model(input_ids=_ids(rows, scorer.tokens), attention_mask=_ids(rows, scorer.tokens), **scorer.arguments)
    how = f"forward pass of {scorer.name} over {rows} conversations of {scorer.tokens} tokens"
    return Phase("reward", (Line("workspace", live.peak, how),))


@dataclass(frozen=True)
class Update:
    """Forward and backward passes over micro-batches, and what is worth saying of them.

    ``forward`` returns the loss of a micro-batch and what else its caller holds on to until the next. ``logits`` are
    their bytes among what the forward pass keeps; ``extra`` tensors of the trainable parameters' size are held beside.
    """

    forward: Callable[[Any, Any], tuple[Tensor, Any]]
    shape: str
    passes: int
    logits: int
    logits_how: str
    copies: int = 0


def update_phase(model: Any, others: Sequence[nn.Module], update: Update, *, autocast: bool) -> Phase:
    """The peak of the forward and backward passes of an optimiser step."""
    with tracing([model, *others], autocast=autocast) as live:
        frozen = others[0] if others else None
        if update.passes > 1:  # from the second micro-batch on the gradients of the first are there
            for parameter in trainable(model):
                parameter.grad = torch.empty_like(parameter)
        before = live.now
        loss, kept = update.forward(model, frozen)
        saved = live.now - before
        loss.backward()
        gradients = live.alive_at_peak(p.grad for p in trainable(model) if p.grad is not None)
        del loss, kept
    saved = min(saved, live.peak - gradients)
    logits = min(update.logits, saved)
    rest = live.peak - gradients - saved
    checkpointing = "gradient checkpointing" if _checkpoints(model) else "no gradient checkpointing"
    lines = [
        Line(
            "gradients",
            gradients,
            "of the trainable parameters, as far as they are there at the peak",
            whole=update.passes > 1,  # ranks sum them in the last micro-batch
        ),
        Line("activations", saved - logits, f"kept for the backward pass, {update.shape}, {checkpointing}"),
        Line("logits", logits, update.logits_how),
        Line("workspace", rest, "what the operation at the peak needs beside these"),
    ]
    if update.copies:
        own = sum(parameter.numel() * parameter.element_size() for parameter in trainable(model))
        lines.append(Line("copies", update.copies * own, f"{update.copies} of the trainable weights"))
    return Phase("update", tuple(lines))


def _checkpoints(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _prefill(model: Any, rows: int, tokens: int) -> Any:
    ids = _ids(rows, tokens)
    return model(input_ids=ids, attention_mask=ids, position_ids=ids, use_cache=True, logits_to_keep=1)


def _ids(rows: int, tokens: int) -> Tensor:
    """Ids, positions or a mask: only their shape counts here."""
    return torch.ones(rows, tokens, dtype=torch.int64)
