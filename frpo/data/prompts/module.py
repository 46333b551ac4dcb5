"""The prompts of a run: read, tokenized and handed out to the ranks."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase

from frpo.data.module import RowsDataModule
from frpo.data.prompts.batch import EncodedPrompt, EvaluationLoader, PromptLoader, encode
from frpo.data.prompts.sources import PromptSource
from frpo.foundation import require
from frpo.types import Stage

OnLongPrompt = Literal["drop", "error"]


class PromptDataModule(RowsDataModule):
    """Prompts for policy optimisation, tokenized with the LightningModule's tokenizer.

    Args:
        train: Prompts to train on.
        val: Prompts of the validation loop.
        test: Prompts of the test loop.
        batch_size: Training prompts per rank and step.
        val_batch_size: Validation and test prompts per rank and batch; null takes ``batch_size``.
        max_prompt_length: Tokens a prompt may have, chat template included.
        on_long_prompt: Leave longer prompts out (``drop``; counted in :attr:`dropped`), or stop (``error``).
        shuffle: Permute the training prompts in every epoch.
        seed: Of those permutations.

    Training goes on from a checkpoint at the exact next batch, see :class:`~frpo.data.prompts.batch.PromptLoader`.
    """

    training = PromptLoader
    ordered = EvaluationLoader
    sources: dict[Stage, PromptSource | None]

    def __init__(
        self,
        train: PromptSource | None = None,
        val: PromptSource | None = None,
        test: PromptSource | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_prompt_length: int = 1024,
        on_long_prompt: OnLongPrompt = "drop",
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
        require.number("PromptDataModule.max_prompt_length", max_prompt_length, at_least=1)
        self.max_prompt_length = self.max_tokens = max_prompt_length
        self.on_long_prompt = require.one_of("PromptDataModule.on_long_prompt", on_long_prompt, OnLongPrompt)

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
        """Read and tokenize the prompts of ``stage``; longer ones are left out or refused."""
        source = self.sources[stage]
        assert source is not None
        rows = encode(source.prompts(), tokenizer)
        refuse = "on_long_prompt: drop" if self.on_long_prompt == "error" else ""
        lengths = [len(row.ids) for row in rows]
        return self.short(
            stage,
            rows,
            lengths,
            limit=self.max_prompt_length,
            option="max_prompt_length",
            noun="prompts",
            refuse=refuse,
        )
