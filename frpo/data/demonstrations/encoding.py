"""Demonstrations through the chat template and the tokenizer: the prompt as a sampler reads it, then the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from frpo.data.prompts.encoding import EncodedPrompt, encode
from frpo.types import Demonstration, Prompt


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
