"""The prompts of a run: read, tokenized and handed out to the ranks."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase

from frpo.data.loader import EvaluationLoader, PromptLoader
from frpo.data.module import RowsDataModule, Stage, check_choices, too_long
from frpo.data.prompts.encoding import EncodedPrompt, encode
from frpo.data.prompts.sources import PromptSource


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

    The training loader goes on from a checkpoint at the exact next batch, see :class:`~frpo.data.loader.PromptLoader`.
    """

    sources: dict[Stage, PromptSource | None]

    def __init__(
        self,
        train: PromptSource | None = None,
        val: PromptSource | None = None,
        test: PromptSource | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_prompt_length: int = 1024,
        on_long_prompt: Literal["drop", "error"] = "drop",
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__({"train": train, "val": val, "test": test})
        check_choices(
            batch_size=batch_size, val_batch_size=val_batch_size, max_prompt_length=max_prompt_length, seed=seed
        )
        if on_long_prompt not in ("drop", "error"):
            raise ValueError(f"on_long_prompt: got {on_long_prompt!r}, expected 'drop' or 'error'")
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.max_prompt_length = self.max_tokens = max_prompt_length
        self.on_long_prompt = on_long_prompt
        self.shuffle = shuffle
        self.seed = seed

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
        """Read and tokenize the prompts of ``stage``; longer ones are left out or refused."""
        source = self.sources[stage]
        assert source is not None
        rows = encode(source.prompts(), tokenizer)
        lengths = [len(row.ids) for row in rows]
        kept = [row for row in rows if len(row.ids) <= self.max_prompt_length]
        self.dropped[stage] = len(rows) - len(kept)
        found = too_long(stage, "prompts", lengths, self.max_prompt_length, "max_prompt_length")
        if found is not None:
            if self.on_long_prompt == "error":
                raise ValueError(f"{found}; raise `max_prompt_length` or set `on_long_prompt: drop`")
            if not kept:
                raise ValueError(f"{found}, the shortest {min(lengths)}: none is left; raise `max_prompt_length`")
            self.warn(f"{found}; they are left out")
        return kept

    def training_loader(self, rows: list[EncodedPrompt], *, pad_token_id: int, **ranks: int) -> PromptLoader:
        """See :class:`~frpo.data.loader.PromptLoader`."""
        return PromptLoader(
            rows,
            batch_size=self.batch_size,
            pad_token_id=pad_token_id,
            shuffle=self.shuffle,
            seed=self.seed,
            **ranks,
        )

    def ordered_loader(self, rows: list[EncodedPrompt], *, pad_token_id: int, **ranks: int) -> EvaluationLoader:
        """See :class:`~frpo.data.loader.EvaluationLoader`."""
        return EvaluationLoader(rows, batch_size=self.val_batch_size, pad_token_id=pad_token_id, **ranks)
