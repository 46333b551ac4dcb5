"""Judged responses for reward-model training: encoded as the reward model will read them, and cut for the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from frpo.data.conversation import ConversationEncoder
from frpo.data.loader import OrderedLoader, TrainingLoader
from frpo.data.module import RowsDataModule, Stage, check_choices
from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.types import Prompt


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
class JudgedBatch:
    """``N`` examples of ``K`` responses. ``targets`` is float32 [N]; ``rows[n].ids[k]`` is not padded yet.

    Example: two pairs give two rows of two lists of ids, and ``targets`` [2] of margins.
    """

    rows: tuple[EncodedExample, ...]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> JudgedBatch:
        """The batch with its tensors on ``device``."""
        return replace(self, targets=self.targets.to(device))


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


class JudgedDataModule(RowsDataModule):
    """Judged responses for :class:`~frpo.reward_modelling.module.RewardModelling`.

    Conversations are encoded as :class:`~frpo.rewards.model.RewardModel` will encode them, cut to the ``max_length`` of
    the module's scorer. An example with a response that alone is longer cannot be scored and is left out.

    Args:
        train: Examples to train on.
        val: Examples of the validation loop.
        test: Examples of the test loop.
        batch_size: Training examples (pairs, or labelled responses) per rank and step.
        val_batch_size: Validation and test examples per rank and batch; null takes ``batch_size``.
        shuffle: Permute the training examples in every epoch.
        seed: Of those permutations.
    """

    example = "frpo.data.preferences.sources.Preferences"
    module_class = "frpo.reward_modelling.module.RewardModelling"
    sources: dict[Stage, JudgedSource | None]

    def __init__(
        self,
        train: JudgedSource | None = None,
        val: JudgedSource | None = None,
        test: JudgedSource | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__({"train": train, "val": val, "test": test})
        check_choices(batch_size=batch_size, val_batch_size=val_batch_size, seed=seed)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.shuffle, self.seed = shuffle, seed

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[EncodedExample]:
        """Read, check and encode the examples of ``stage``."""
        source = self.sources[stage]
        assert source is not None
        assert self.trainer is not None, "setup refuses to go on without one"
        module: Any = self.trainer.lightning_module
        if source.responses != module.loss.responses:
            kinds = {1: "labelled responses", 2: "pairs"}
            raise ValueError(
                f"data.init_args.{stage}: {type(source).__name__} gives {kinds[source.responses]}, but "
                f"{type(module.loss).__name__} is a loss of {kinds[module.loss.responses]}; change one of the two"
            )
        examples = source.examples()
        for example in examples:
            _check_target(example, module.loss)
        rows = encode(examples, ConversationEncoder(tokenizer, module.scorer.max_length))
        self._report(stage, len(examples), len(rows), module.scorer.max_length)
        return rows

    def _report(self, stage: Stage, read: int, kept: int, max_length: int) -> None:
        self.dropped[stage] = read - kept
        found = f"{stage}: {read - kept} of {read} examples have a response over max_length={max_length} tokens"
        if not kept:
            raise ValueError(f"{found}: none is left; raise `model.init_args.scorer.init_args.max_length`")
        if kept < read:
            self.warn(f"{found}; they are left out")

    def training_loader(self, rows: list[EncodedExample], *, pad_token_id: int, **ranks: int) -> JudgedLoader:
        """See :class:`~frpo.data.loader.TrainingLoader`."""
        return JudgedLoader(
            rows,
            batch_size=self.batch_size,
            pad_token_id=pad_token_id,
            shuffle=self.shuffle,
            seed=self.seed,
            **ranks,
        )

    def ordered_loader(self, rows: list[EncodedExample], *, pad_token_id: int, **ranks: int) -> OrderedJudgedLoader:
        """See :class:`~frpo.data.loader.OrderedLoader`."""
        return OrderedJudgedLoader(rows, batch_size=self.val_batch_size, pad_token_id=pad_token_id, **ranks)


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


def _check_target(example: JudgedExample, loss: Any) -> None:
    try:
        loss.check_target(example.target)
    except ValueError as error:
        raise ValueError(f"row {example.prompt.id}: {error}") from error
