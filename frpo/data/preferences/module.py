"""Judged responses for reward-model training: encoded as the reward model will read them, and cut for the ranks."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from frpo.data.conversation import ConversationEncoder
from frpo.data.module import RowsDataModule
from frpo.data.preferences.batch import EncodedExample, JudgedLoader, OrderedJudgedLoader, encode
from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.types import Stage


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

    training = JudgedLoader
    ordered = OrderedJudgedLoader
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
        super().__init__(
            {"train": train, "val": val, "test": test},
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            shuffle=shuffle,
            seed=seed,
        )

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
        limit = module.scorer.max_length
        rows = encode(examples, ConversationEncoder(tokenizer, limit))
        long = len(examples) - len(rows)
        found = f"{stage}: {long} of {len(examples)} examples have a response over max_length={limit} tokens"
        self.leave_out(stage, len(examples), len(rows), found, "raise `model.init_args.scorer.init_args.max_length`")
        return rows


def _check_target(example: JudgedExample, loss: Any) -> None:
    try:
        loss.check_target(example.target)
    except ValueError as error:
        raise ValueError(f"row {example.prompt.id}: {error}") from error
