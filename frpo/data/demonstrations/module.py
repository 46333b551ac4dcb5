"""Demonstrations for supervised fine-tuning: read, tokenized, batched and handed out to the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from frpo.data.demonstrations.batch import (
    DemonstrationLoader,
    EncodedDemonstration,
    OrderedDemonstrations,
    encode_demonstrations,
)
from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.data.module import RowsDataModule
from frpo.foundation import require
from frpo.types import Stage

OnLong = Literal["drop", "cut", "error"]


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

    Training goes on from a checkpoint at the exact next batch, see :class:`~frpo.data.loader.TrainingLoader`.
    """

    training = DemonstrationLoader
    ordered = OrderedDemonstrations
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
        on_long: OnLong = "drop",
        group_by_length: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        packing: bool = False,
    ) -> None:
        super().__init__(
            {"train": train, "val": val},
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            shuffle=shuffle,
            seed=seed,
        )
        self.max_length = require.number("SupervisedDataModule.max_length", max_length, at_least=1)
        self.on_long = require.one_of("SupervisedDataModule.on_long", on_long, OnLong)
        self.group_by_length, self.packing = group_by_length, packing
        self.cut = {}

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[EncodedDemonstration]:
        """Read and tokenize the demonstrations of ``stage``; longer ones are left out, cut or refused."""
        source = self.sources[stage]
        assert isinstance(source, DemonstrationSource)
        rows = encode_demonstrations(source.demonstrations(), tokenizer)
        self.cut[stage] = 0
        if self.on_long == "cut":
            rows = self._cut(stage, rows)
        refuse = "on_long: drop" if self.on_long == "error" else ""
        lengths = [len(row.ids) for row in rows]
        kept = self.short(
            stage, rows, lengths, limit=self.max_length, option="max_length", noun="demonstrations", refuse=refuse
        )
        self.max_tokens = max(self.max_tokens, *(len(row.ids) for row in kept))
        return kept

    def _cut(self, stage: Stage, rows: list[EncodedDemonstration]) -> list[EncodedDemonstration]:
        """Rows with their answers cut at ``max_length``; one whose prompt alone is too long is as it was."""
        long = {i for i, row in enumerate(rows) if row.answer_start < self.max_length < len(row.ids)}
        self.cut[stage] = len(long)
        if long:
            self.warn(f"{stage}: {len(long)} of {len(rows)} answers are cut at max_length={self.max_length} tokens")
        return [replace(row, ids=row.ids[: self.max_length]) if i in long else row for i, row in enumerate(rows)]

    def stream(self) -> dict[str, Any]:
        """See :class:`~frpo.data.demonstrations.batch.DemonstrationLoader`."""
        return {
            "group_by_length": self.group_by_length,
            "row_tokens": self.max_length if self.packing else None,
        }
