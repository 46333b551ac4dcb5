"""Demonstrations through the chat template and the tokenizer: the prompt as a sampler reads it, then the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from frpo.data.loader import OrderedLoader, TrainingLoader, permutation
from frpo.data.prompts.batch import EncodedPrompt, encode
from frpo.types import Batch, Demonstration, Prompt

MEGA_BATCHES = 50
"""Steps among whose rows ``group_by_length`` sorts: more give batches of more equal lengths, fewer a better shuffle."""
EPOCHS = 2**63
"""Beyond any epoch: keys the permutation of batches apart from that of rows."""


@dataclass(frozen=True)
class EncodedDemonstration:
    """A demonstration as the model reads it.

    ``ids`` int64 [S]: the first ``answer_start`` are the prompt, token by token what a sampler is given for it; the
    others are the answer up to and including the end-of-sequence token.
    """

    prompt: Prompt
    ids: Tensor
    answer_start: int


def encode_demonstrations(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedDemonstration]:
    """Apply the chat template with the answer as the assistant's turn, and tokenize.

    The turn ends in the tokenizer's end-of-sequence token: what the template writes behind it is cut off, and it is
    added where the template writes none, so that the policy learns to stop where sampling stops.

    Raises ``ValueError`` where the tokenizer has no chat template, the template refuses a row, or the conversation
    with the answer does not start with the prompt as it is sampled from.
    """
    prompts = encode([demonstration.prompt for demonstration in demonstrations], tokenizer)
    return [
        _encode(prompt, demonstration.answer, tokenizer)
        for prompt, demonstration in zip(prompts, demonstrations, strict=True)
    ]


def _encode(prompt: EncodedPrompt, answer: str, tokenizer: PreTrainedTokenizerBase) -> EncodedDemonstration:
    turn = {"role": "assistant", "content": answer}
    messages = [*(dict(message) for message in prompt.prompt.messages), turn]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the answer to {prompt.prompt.id!r}: {error}"
        ) from error
    assert isinstance(text, str)
    start, full = len(prompt.ids), tokenizer(text, add_special_tokens=False)["input_ids"]
    rest = full[start:] if full[:start] == prompt.ids.tolist() else _answer_alone(prompt, text, full, tokenizer)
    rest = _ended(rest, tokenizer)
    return EncodedDemonstration(prompt.prompt, torch.cat([prompt.ids, torch.tensor(rest, dtype=torch.int64)]), start)


def _answer_alone(prompt: EncodedPrompt, text: str, full: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer's tokens where one would join the end of the prompt (two newlines, say): as a sampler puts them."""
    if not text.startswith(prompt.text):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} writes prompt {prompt.prompt.id!r} in one way before an "
            f"answer ({prompt.text[-40:]!r} at its end) and in another with one, so a policy trained on the latter "
            "would not be the one that is sampled from. Give policy.init_args.chat_template a template whose text "
            "with the answer starts with its text for the prompt alone (add_generation_prompt=True)"
        )
    rest: list[int] = tokenizer(text[len(prompt.text) :], add_special_tokens=False)["input_ids"]
    if tokenizer.decode([*prompt.ids.tolist(), *rest]) != tokenizer.decode(full):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} joins the end of prompt {prompt.prompt.id!r} and the "
            "start of its answer into one token and cannot write them apart; drop the row, or give "
            "policy.init_args.chat_template a template that ends the prompt in a special token"
        )
    return rest


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Cut white space behind the last end-of-sequence token, or add that token."""
    eos = tokenizer.eos_token_id
    last = max((i for i, token in enumerate(ids) if token == eos), default=-1)
    behind = tokenizer.decode(ids[last + 1 :])
    assert isinstance(behind, str)
    if last >= 0 and not behind.strip():
        return ids[: last + 1]
    return [*ids, eos]


@dataclass(frozen=True)
class SupervisedBatch(Batch):
    """``B`` rows of ``S`` tokens, each a prompt and the answer to imitate, padded on the right.

    Shapes: ``input_ids`` and ``position_ids`` int64 [B, S]; ``mask`` bool [B, S], True on tokens; ``answer_mask`` bool
    [B, S], True on the tokens to imitate: the answer and its end-of-sequence token. ``ids[b]`` names the
    demonstration of row b. With ``row_tokens`` the micro-batches of :meth:`split` are packed.

    A ``packed`` batch has several demonstrations in a row, one after the other, and their names in that order, row by
    row. ``position_ids`` begin at 0 with each of them and are 0 on padding: a model that is given no mask reads from
    them which tokens belong together.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    answer_mask: Tensor
    row_tokens: int | None = None
    packed: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens to imitate."""
        return int(self.answer_mask.sum())

    def take(self, rows: Tensor) -> SupervisedBatch:
        """The rows of these places (int64 [b]), no wider than the longest of them."""
        S = int(self.mask[rows].sum(-1).max())
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows.tolist()),
            input_ids=self.input_ids[rows, :S],
            position_ids=self.position_ids[rows, :S],
            mask=self.mask[rows, :S],
            answer_mask=self.answer_mask[rows, :S],
        )

    def split(self, size: int) -> Iterator[SupervisedBatch]:
        """Cut the rows into ``ceil(B / size)`` micro-batches, longest rows first, each no wider than its longest.

        With ``row_tokens`` the demonstrations first go into as few rows of up to that many tokens as first-fit makes
        of them; B is the number of those rows then.
        """
        lengths = self.mask.sum(-1)
        if self.row_tokens is not None:
            yield from self._split_packed(lengths.tolist(), self.row_tokens, size)
            return
        for rows in lengths.argsort(descending=True, stable=True).split(size):
            yield self.take(rows)

    def _split_packed(self, lengths: list[int], row_tokens: int, size: int) -> Iterator[SupervisedBatch]:
        rows = sorted(first_fit(lengths, row_tokens), key=lambda row: -sum(lengths[i] for i in row))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]

            def joined(values: Tensor, part: list[list[int]] = part) -> Tensor:
                return pad_sequence([torch.cat([values[i, : lengths[i]] for i in row]) for row in part], True)

            yield SupervisedBatch(
                ids=tuple(self.ids[i] for row in part for i in row),
                input_ids=joined(self.input_ids),
                position_ids=joined(self.position_ids),
                mask=joined(self.mask),
                answer_mask=joined(self.answer_mask),
                packed=True,
            )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of up to ``capacity`` tokens, as places in ``lengths``: each goes, in order, into the first with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place, length in enumerate(lengths):
        assert length <= capacity, f"{length} tokens, and rows of {capacity}"
        row = next((row for row, free in enumerate(room) if length <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(place)
        room[row] -= length
    return rows


def collate_demonstrations(
    rows: list[EncodedDemonstration], pad_token_id: int, row_tokens: int | None = None
) -> SupervisedBatch:
    """Pad rows on the right to the longest of them; ``row_tokens`` as in :class:`SupervisedBatch`."""
    input_ids = pad_sequence([row.ids for row in rows], batch_first=True, padding_value=pad_token_id)
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids).contiguous()
    mask = positions < torch.tensor([len(row.ids) for row in rows])[:, None]
    answer_mask = mask & (positions >= torch.tensor([row.answer_start for row in rows])[:, None])
    ids = tuple(row.prompt.id for row in rows)
    return SupervisedBatch(ids, input_ids, positions, mask, answer_mask, row_tokens)


class DemonstrationLoader(TrainingLoader[EncodedDemonstration, SupervisedBatch]):
    """The training stream of demonstrations.

    With ``group_by_length`` the rows of ``MEGA_BATCHES`` steps at a time are sorted by length within the permuted
    order, and the batches of an epoch permuted. A run then goes on with the same number of rows per step only.
    ``row_tokens`` has no influence on the stream: it is how the micro-batches of a batch are laid out.
    """

    noun = "demonstrations"
    fixed: ClassVar[dict[str, str]] = {
        **TrainingLoader.fixed,
        "grouped": "restore `group_by_length`, and with it `batch_size` times the number of devices",
    }

    def __init__(
        self,
        rows: Sequence[EncodedDemonstration],
        *,
        group_by_length: bool = False,
        row_tokens: int | None = None,
        **stream: Any,
    ) -> None:
        super().__init__(rows, **stream)
        self.group_by_length, self.row_tokens = group_by_length, row_tokens

    def order(self, epoch: int) -> np.ndarray:
        """See :meth:`TrainingLoader.order`."""
        order = super().order(epoch)
        if not self.group_by_length:
            return order
        step = self.batch_size * self.world_size
        whole = len(order) // step * step  # rows beyond are left out of this epoch: chance decides which, not length
        lengths = np.array([len(row.ids) for row in self.rows])
        parts = np.split(order[:whole], range(MEGA_BATCHES * step, whole, MEGA_BATCHES * step))
        batches = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts]).reshape(-1, step)
        if self.shuffle:
            batches = batches[permutation(len(batches), self.seed, epoch + EPOCHS)]
        return np.concatenate([batches.reshape(-1), order[whole:]])

    def state_dict(self) -> dict[str, int]:
        """See :meth:`TrainingLoader.state_dict`; with the rows of a step, where they decide the order."""
        grouped = self.batch_size * self.world_size if self.group_by_length else 0
        return {**super().state_dict(), "grouped": grouped}

    def collate(self, rows: list[EncodedDemonstration], positions: list[int]) -> SupervisedBatch:
        """See :func:`collate_demonstrations`."""
        return collate_demonstrations(rows, self.pad_token_id, self.row_tokens)


class OrderedDemonstrations(OrderedLoader[EncodedDemonstration, SupervisedBatch]):
    """One pass over demonstrations."""

    noun = "demonstrations"

    def collate(self, rows: list[EncodedDemonstration], positions: list[int]) -> SupervisedBatch:
        """See :func:`collate_demonstrations`."""
        return collate_demonstrations(rows, self.pad_token_id)
