"""The records a batch of prompts becomes on its walk: prompts -> rollouts -> scored rollouts.

Axes: ``P`` prompts, ``G`` completions per prompt (the group), ``L`` prompt tokens, ``T`` completion tokens.
Every mask is True where something counts. A group is an axis of the tensor; nothing is ever regrouped by content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

Status = Literal["value", "abstain", "failed"]
Stage = Literal["train", "val", "test"]
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt data set, not yet tokenised.

    ``messages`` is the chat (``{"role": ..., "content": ...}``), ``task`` the key that routes rewards and metrics,
    ``fields`` whatever else the row carried (an ``answer``, say).

    Example: ``Prompt(id="7", messages=({"role": "user", "content": "Hi"},), task="normal")``.
    """

    id: str
    messages: Messages
    task: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt and an answer to imitate, not yet tokenised.

    Example: ``Demonstration(Prompt("7", ({"role": "user", "content": "2 + 2?"},), "arithmetic"), "4")``.
    """

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class DataFacts:
    """What a data module tells the module that trains or evaluates on it, once its rows are read.

    ``tasks`` of the rows; ``max_tokens``, the tokens that a row may have (a prompt, for prompts); ``packed``, whether a
    row of a batch holds several demonstrations.

    Example: ``DataFacts(tasks=frozenset({"safety", "normal"}), max_tokens=1024)``.
    """

    tasks: frozenset[str] = frozenset()
    max_tokens: int = 0
    packed: bool = False


@dataclass(frozen=True)
class Batch:
    """A record of tensors that moves to a device as a whole."""

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on ``device``, those of batches in it too."""
        return replace(self, **{part.name: _moved(getattr(self, part.name), device) for part in fields(self)})


@dataclass(frozen=True)
class PromptBatch(Batch):
    """``P`` tokenised prompts, padded on the left.

    Shapes: ``input_ids`` int64 [P, L]; ``mask`` bool [P, L], True on prompt tokens; ``position`` int64 [P], the
    running number of the prompt in the stream of all prompts of the run, the same whatever the world size or batch
    size: sampling noise is keyed by it. ``texts[p]`` is the prompt as the model reads it.

    Example: two prompts of 3 and 2 tokens give ``input_ids`` [2, 3] and ``mask = [[1, 1, 1], [0, 1, 1]]``.
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    input_ids: Tensor
    mask: Tensor
    position: Tensor

    def __post_init__(self) -> None:
        P = len(self.prompts)
        _shape("PromptBatch.input_ids", self.input_ids, (P, None))
        _shape("PromptBatch.mask", self.mask, tuple(self.input_ids.shape), torch.bool)
        _shape("PromptBatch.position", self.position, (P,))
        assert len(self.texts) == P, f"PromptBatch.texts: got {len(self.texts)} texts for {P} prompts"

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RolloutBatch:
    """``G`` sampled completions for each of ``P`` prompts, padded on the right.

    Shapes: ``completion_ids`` int64 [P, G, T]; ``mask`` bool [P, G, T], True on completion tokens up to and including
    the end-of-sequence token; ``logps`` float32 or wider [P, G, T], log-probability of each token under the
    distribution it was drawn from, 0 where masked; ``truncated`` bool [P, G], True where no end-of-sequence token was
    drawn within the limit. ``texts[p][g]`` is the decoded completion without special tokens.

    Example: ``mask[p, g].sum()`` is T_i, the length of completion ``g`` of prompt ``p``.
    """

    prompts: PromptBatch
    completion_ids: Tensor
    mask: Tensor
    logps: Tensor
    truncated: Tensor
    texts: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        P = len(self.prompts)
        _shape("RolloutBatch.completion_ids", self.completion_ids, (P, None, None))
        PGT = tuple(self.completion_ids.shape)
        _shape("RolloutBatch.mask", self.mask, PGT, torch.bool)
        _shape("RolloutBatch.logps", self.logps, PGT)
        _shape("RolloutBatch.truncated", self.truncated, PGT[:2], torch.bool)
        assert [len(row) for row in self.texts] == [PGT[1]] * P, "RolloutBatch.texts must be P rows of G texts"

    @property
    def lengths(self) -> Tensor:
        """Completion lengths T_i, int64 [P, G]."""
        return self.mask.sum(-1)

    def completions(self) -> list[Completion]:
        """The P*G completions as flat records, prompt by prompt, for rewards to read."""
        lengths, truncated = self.lengths.tolist(), self.truncated.tolist()
        return [
            Completion(
                prompt=prompt,
                prompt_text=self.prompts.texts[p],
                text=self.texts[p][g],
                truncated=truncated[p][g],
                length=lengths[p][g],
            )
            for p, prompt in enumerate(self.prompts.prompts)
            for g in range(self.completion_ids.shape[1])
        ]


@dataclass(frozen=True)
class Completion:
    """One completion as a reward sees it: the prompt row, the decoded text, and whether it was cut off."""

    prompt: Prompt
    prompt_text: str
    text: str
    truncated: bool = False
    length: int = 0

    @property
    def task(self) -> str:
        """The task of the prompt."""
        return self.prompt.task


@dataclass(frozen=True)
class Judgement:
    """What a reward says of one completion: a value, an abstention, or a failure, never a stand-in number.

    ``components`` keeps the parts of a composed reward by name, for the completion table.

    Example: ``Judgement.of(0.5)``, ``Judgement.abstain("row has no answer")``, ``Judgement.failed("judge timed out")``.
    """

    status: Status
    value: float = math.nan
    reason: str = ""
    components: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status == "value" and not math.isfinite(self.value):
            raise ValueError(
                f"a Judgement with status 'value' needs a finite number, got {self.value}; "
                "write Judgement.failed('why') where no score could be computed"
            )

    @classmethod
    def of(cls, value: float, components: Mapping[str, float] | None = None) -> Judgement:
        """A judgement with a value."""
        return cls("value", float(value), components=components or {})

    @classmethod
    def abstain(cls, reason: str) -> Judgement:
        """The reward does not apply to this completion; it leaves the group and is counted."""
        return cls("abstain", reason=reason)

    @classmethod
    def failed(cls, reason: str) -> Judgement:
        """The judgement could not be made; it leaves the group, is counted, and counts against the failure cap."""
        return cls("failed", reason=reason)


@dataclass(frozen=True)
class ScoredBatch:
    """A rollout with its rewards.

    Shapes: ``rewards`` float64 [P, G], 0 where ``reward_mask`` (bool [P, G]) is False; ``judgements`` the P*G
    judgements in the order of :meth:`RolloutBatch.completions`; ``weights`` float [P, G] or None, the coefficient of
    each completion in the loss (dL/da_i, see frpo.objectives), set once the objective has seen the group.
    """

    rollout: RolloutBatch
    rewards: Tensor
    reward_mask: Tensor
    judgements: tuple[Judgement, ...]
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        PG = tuple(self.rollout.completion_ids.shape[:2])
        _shape("ScoredBatch.rewards", self.rewards, PG)
        _shape("ScoredBatch.reward_mask", self.reward_mask, PG, torch.bool)
        assert len(self.judgements) == PG[0] * PG[1], "ScoredBatch.judgements must hold one judgement per completion"

    def records(self) -> list[dict[str, Any]]:
        """One JSON-ready dict per completion: prompt, text, reward by component, weight, task, status."""
        G = self.rewards.shape[1]
        weights = None if self.weights is None else self.weights.flatten().tolist()
        return [
            {
                "prompt_id": completion.prompt.id,
                "task": completion.task,
                "sample": i % G,
                "prompt": completion.prompt_text,
                "completion": completion.text,
                "tokens": completion.length,
                "truncated": completion.truncated,
                "status": judgement.status,
                "reward": judgement.value if judgement.status == "value" else None,
                "components": dict(judgement.components),
                "reason": judgement.reason,
                "weight": None if weights is None else weights[i],
            }
            for i, (completion, judgement) in enumerate(zip(self.rollout.completions(), self.judgements, strict=True))
        ]


@dataclass(frozen=True)
class StepRecord:
    """What the last step saw: its stage, the optimiser step at which its rollout was drawn, and the scored rollout."""

    stage: Stage
    step: int
    scored: ScoredBatch


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor | Batch) else value


def _shape(name: str, tensor: Tensor, expected: Sequence[int | None], dtype: torch.dtype | None = None) -> None:
    got = tuple(tensor.shape)
    fits = len(got) == len(expected) and all(e is None or g == e for g, e in zip(got, expected, strict=True))
    assert fits, f"{name}: got shape {got}, expected {tuple(expected)}"
    assert dtype is None or tensor.dtype == dtype, f"{name}: got {tensor.dtype}, expected {dtype}"
