"""Prompts through the chat template and the tokenizer, into padded batches, and handed out to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from frpo.data.loader import OrderedLoader, TrainingLoader
from frpo.types import Prompt, PromptBatch


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it: ``text`` after the chat template, ``ids`` int64 [L] of that text."""

    prompt: Prompt
    text: str
    ids: Tensor


def encode(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    """Apply the chat template, up to where the answer starts, and tokenize.

    Special tokens come from the template alone, so a template that writes the beginning-of-sequence token gives one.
    Raises ``ValueError`` where the tokenizer has no chat template, or the template refuses a prompt.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so prompts cannot be written the "
            "way the model expects; set `model.init_args.policy.init_args.chat_template` to a jinja file or "
            "string, or choose an instruction-tuned model"
        )
    return [_encode(prompt, tokenizer) for prompt in prompts]


def _encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    messages = [dict(message) for message in prompt.messages]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses prompt {prompt.id!r} with roles {roles}: "
            f"{error}. Many templates take no system message (set `system: null`) and want user and assistant "
            "to alternate"
        ) from error
    assert isinstance(text, str)
    if not ids:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} turns prompt {prompt.id!r} into no tokens; "
            "check the template"
        )
    return EncodedPrompt(prompt, text, torch.tensor(ids, dtype=torch.int64))


def collate(rows: Sequence[EncodedPrompt], positions: Sequence[int], pad_token_id: int) -> PromptBatch:
    """Pad ``P`` prompts on the left to the longest of them. ``positions`` are their numbers in the stream."""
    ids = [row.ids for row in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id, padding_side="left")
    lengths = torch.tensor([len(row.ids) for row in rows])
    return PromptBatch(
        prompts=tuple(row.prompt for row in rows),
        texts=tuple(row.text for row in rows),
        input_ids=input_ids,
        mask=torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - lengths[:, None],
        position=torch.tensor(positions, dtype=torch.int64),
    )


class PromptLoader(TrainingLoader[EncodedPrompt, PromptBatch]):
    """The training stream of prompts, padded on the left.

    ``PromptBatch.position`` is ``epoch * rows + index in the epoch's order``: never the same twice in a run,
    whatever the batch size.
    """

    noun = "prompts"

    def collate(self, rows: list[EncodedPrompt], positions: list[int]) -> PromptBatch:
        """See :func:`collate`."""
        return collate(rows, positions, self.pad_token_id)


class EvaluationLoader(OrderedLoader[EncodedPrompt, PromptBatch]):
    """One pass over prompts. ``PromptBatch.position`` is the row number."""

    noun = "prompts"

    def collate(self, rows: list[EncodedPrompt], positions: list[int]) -> PromptBatch:
        """See :func:`collate`."""
        return collate(rows, positions, self.pad_token_id)
