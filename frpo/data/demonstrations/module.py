"""Demonstrations for supervised fine-tuning: read, tokenized, batched and handed out to the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from frpo.data.demonstrations.encoding import EncodedDemonstration, encode_demonstrations
from frpo.data.demonstrations.source import DemonstrationSource
from frpo.data.loader import OrderedLoader, TrainingLoader, permutation
from frpo.data.module import RowsDataModule, Stage, check_choices, too_long

MEGA_BATCHES = 50
"""Steps among whose rows ``group_by_length`` sorts: more give batches of more equal lengths, fewer a better shuffle."""
EPOCHS = 2**63
"""Beyond any epoch: keys the permutation of batches apart from that of rows."""


@dataclass(frozen=True)
class SupervisedBatch:
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

    def to(self, device: torch.device | str) -> SupervisedBatch:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            mask=self.mask.to(device),
            answer_mask=self.answer_mask.to(device),
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
            S = int(lengths[rows].max())
            yield SupervisedBatch(
                ids=tuple(self.ids[row] for row in rows.tolist()),
                input_ids=self.input_ids[rows, :S],
                position_ids=self.position_ids[rows, :S],
                mask=self.mask[rows, :S],
                answer_mask=self.answer_mask[rows, :S],
            )

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
    B, S = len(rows), max(len(row.ids) for row in rows)
    input_ids = torch.full((B, S), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(B, S, dtype=torch.bool)
    answer_mask = torch.zeros(B, S, dtype=torch.bool)
    for b, row in enumerate(rows):
        input_ids[b, : len(row.ids)] = row.ids
        mask[b, : len(row.ids)] = True
        answer_mask[b, row.answer_start : len(row.ids)] = True
    positions = torch.arange(S).expand(B, S).contiguous()
    ids = tuple(row.prompt.id for row in rows)
    return SupervisedBatch(ids, input_ids, positions, mask, answer_mask, row_tokens)


class DemonstrationLoader(TrainingLoader[EncodedDemonstration, SupervisedBatch]):
    """The training stream of demonstrations.

    With ``group_by_length`` the rows of ``MEGA_BATCHES`` steps at a time are sorted by length within the permuted
    order, and the batches of an epoch permuted. A run then goes on with the same number of rows a step only.
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


class SupervisedDataModule(RowsDataModule):
    """Demonstrations for supervised fine-tuning, tokenized with the LightningModule's tokenizer.

    Args:
        train: Demonstrations to train on.
        val: Demonstrations of the validation loop.
        batch_size: Demonstrations per rank and optimiser step.
        val_batch_size: Demonstrations of validation per rank and batch; null takes ``batch_size``.
        max_length: Tokens that prompt and answer may have together, chat template included.
        on_long: Leave longer ones out (``drop``; counted in :attr:`dropped`), ``cut`` the end of their answers
            (counted in :attr:`cut`; one whose prompt alone is too long is dropped), or stop (``error``).
        group_by_length: Put rows of like lengths into a batch: less padding, and a little less chance in the order.
        shuffle: Permute the training rows in every epoch.
        seed: Of those permutations.
        packing: Put several demonstrations of a training batch into one row of up to ``max_length`` tokens, none of
            which attends to another. The demonstrations of a step, its loss and the place in the stream stay the
            same, only the forward passes are fewer and longer; the module's ``micro_batch_size`` then counts rows. It
            pays where a step has few demonstrations, short beside ``max_length``: on one CPU thread, with lengths
            around a twelfth of it and a ``micro_batch_size`` of 2, a step of 4 took 1.45 times as long without, one
            of 32 1.06 times.

    The training loader goes on from a checkpoint at the exact next batch, see
    :class:`~frpo.data.loader.TrainingLoader`.
    """

    example = "frpo.data.demonstrations.sources.FileDemonstrations"
    module_class = "frpo.modules.supervised.SupervisedFineTuning"

    cut: dict[str, int]
    """Demonstrations whose answer was cut for its length, by stage."""

    def __init__(
        self,
        train: DemonstrationSource | None = None,
        val: DemonstrationSource | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_length: int = 2048,
        on_long: Literal["drop", "cut", "error"] = "drop",
        group_by_length: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        packing: bool = False,
    ) -> None:
        super().__init__({"train": train, "val": val})
        check_choices(batch_size=batch_size, val_batch_size=val_batch_size, max_length=max_length, seed=seed)
        if on_long not in ("drop", "cut", "error"):
            raise ValueError(f"on_long: got {on_long!r}, expected 'drop', 'cut' or 'error'")
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.max_length, self.on_long = max_length, on_long
        self.group_by_length, self.shuffle, self.seed, self.packing = group_by_length, shuffle, seed, packing
        self.cut = {}

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[EncodedDemonstration]:
        """Read and tokenize the demonstrations of ``stage``; longer ones are left out, cut or refused."""
        source = self.sources[stage]
        assert isinstance(source, DemonstrationSource)
        kept = self._fitting(stage, encode_demonstrations(source.demonstrations(), tokenizer))
        self.max_tokens = max(self.max_tokens, *(len(row.ids) for row in kept))
        return kept

    def _fitting(self, stage: Stage, rows: list[EncodedDemonstration]) -> list[EncodedDemonstration]:
        kept = [row for row in rows if len(row.ids) <= self.max_length]
        found = too_long(stage, "demonstrations", [len(row.ids) for row in rows], self.max_length, "max_length")
        self.dropped[stage] = self.cut[stage] = 0
        if found is None:
            return kept
        if self.on_long == "error":
            raise ValueError(f"{found}; raise `max_length` or set `on_long: drop`")
        if self.on_long == "cut":
            self.cut[stage] = sum(row.answer_start < self.max_length < len(row.ids) for row in rows)
            kept = [replace(row, ids=row.ids[: self.max_length]) for row in rows if row.answer_start < self.max_length]
        self.dropped[stage] = len(rows) - len(kept)
        if not kept:
            raise ValueError(f"{found}: none is left; raise `max_length`")
        self.warn(f"{found}; {self.dropped[stage]} are left out, {self.cut[stage]} are cut")
        return kept

    def training_loader(
        self, rows: list[EncodedDemonstration], *, pad_token_id: int, **ranks: int
    ) -> DemonstrationLoader:
        """See :class:`DemonstrationLoader`."""
        return DemonstrationLoader(
            rows,
            batch_size=self.batch_size,
            pad_token_id=pad_token_id,
            group_by_length=self.group_by_length,
            row_tokens=self.max_length if self.packing else None,
            shuffle=self.shuffle,
            seed=self.seed,
            **ranks,
        )

    def ordered_loader(
        self, rows: list[EncodedDemonstration], *, pad_token_id: int, **ranks: int
    ) -> OrderedDemonstrations:
        """See :class:`OrderedDemonstrations`."""
        return OrderedDemonstrations(rows, batch_size=self.val_batch_size, pad_token_id=pad_token_id, **ranks)
