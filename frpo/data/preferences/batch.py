"""Judged responses: encoded as the reward model will read them, batched and handed out to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frpo.data.conversation import ConversationEncoder
from frpo.data.loader import OrderedLoader, TrainingLoader
from frpo.data.preferences.sources import JudgedExample
from frpo.types import Batch, Prompt


@dataclass(frozen=True)
class EncodedExample:
    """An example as the model reads it: the token ids of the conversation with each response."""

    example: JudgedExample
    ids: tuple[list[int], ...]

    @property
    def prompt(self) -> Prompt:
        """The prompt of the example."""
        return self.example.prompt


@dataclass(frozen=True)
class JudgedBatch(Batch):
    """``N`` examples of ``K`` responses. ``targets`` is float32 [N]; ``rows[n].ids[k]`` is not padded yet.

    Example: two pairs give two rows of two lists of ids, and ``targets`` [2] of margins.
    """

    rows: tuple[EncodedExample, ...]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def encode(examples: Sequence[JudgedExample], encoder: ConversationEncoder) -> list[EncodedExample]:
    """Encode examples; one with a response that alone does not fit is left out.

    Raises ``ValueError`` for a tokenizer without chat template: there is no policy here whose reading of the prompt
    could stand in for it.
    """
    if encoder.tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {encoder.tokenizer.name_or_path!r} has no chat template to write a conversation with; "
            "set `chat_template` of the scorer's base to a jinja file or string"
        )
    rows = (EncodedExample(e, tuple(encoder(completion) for completion in e.completions())) for e in examples)
    return [row for row in rows if all(row.ids)]


def collate(rows: Sequence[EncodedExample]) -> JudgedBatch:
    """A batch of examples."""
    return JudgedBatch(tuple(rows), torch.tensor([row.example.target for row in rows], dtype=torch.float32))


class JudgedLoader(TrainingLoader[EncodedExample, JudgedBatch]):
    """The training stream of judged examples."""

    noun = "examples"

    def collate(self, rows: list[EncodedExample], positions: list[int]) -> JudgedBatch:
        """See :func:`collate`."""
        return collate(rows)


class OrderedJudgedLoader(OrderedLoader[EncodedExample, JudgedBatch]):
    """One pass over judged examples."""

    noun = "examples"

    def collate(self, rows: list[EncodedExample], positions: list[int]) -> JudgedBatch:
        """See :func:`collate`."""
        return collate(rows)
