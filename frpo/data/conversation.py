"""How a sequence classifier reads a conversation: one encoding for training and for scoring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from frpo.types import Completion


class ConversationEncoder:
    """Token ids of a prompt's messages with the completion as the assistant's, through the tokenizer's chat template.

    Without a chat template, the prompt as the policy read it followed by the completion. Special tokens spelled out in
    the text are broken up, so that a completion cannot end its own turn and start another.

    Args:
        tokenizer: of the classifier.
        max_length: tokens. A longer conversation loses its oldest ones; a beginning-of-sequence token stays.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.special_tokens = control_tokens(tokenizer)

    def __call__(self, completion: Completion) -> list[int]:
        """The ids, at most ``max_length``; none where the completion alone does not fit."""
        answer = self._plain(completion.text)
        if len(self._ids(answer)) > self.max_length:
            return []
        if self.tokenizer.chat_template is None:
            ids = self._ids(completion.prompt_text + answer, add_special_tokens=True)
        else:
            messages = [{**m, "content": self._plain(m["content"])} for m in completion.prompt.messages]
            messages.append({"role": "assistant", "content": answer})
            ids = self._ids(str(self.tokenizer.apply_chat_template(messages, tokenize=False)))
        if len(ids) <= self.max_length:
            return ids
        bos = self.tokenizer.bos_token_id
        kept = ids[len(ids) - self.max_length :]
        return [bos, *kept[1:]] if bos is not None and ids[0] == bos else kept

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: Any = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return list(ids)

    def _plain(self, text: str) -> str:
        return broken_up(text, self.special_tokens)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens, and the other added ones that the chat template writes: what a text must not spell out."""
    templates = tokenizer.chat_template or ""
    template = templates if isinstance(templates, str) else "".join(templates.values())
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special or str(token) in template}
    return sorted(token for token in added | set(tokenizer.all_special_tokens) if token.strip())


def broken_up(text: str, tokens: Sequence[str]) -> str:
    """``text`` with a space after the first character of each of ``tokens`` spelled out in it, overlaps included."""
    for token in tokens:
        if len(token) > 1 and token in text:
            text = re.sub(f"{re.escape(token[0])}(?={re.escape(token[1:])})", lambda found: f"{found[0]} ", text)
    return text


def pad_right(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [N, L] and mask bool [N, L] of ``N`` rows, padded on the right to the longest."""
    lengths = torch.tensor([len(ids) for ids in rows])
    input_ids = pad_sequence(
        [torch.tensor(ids, dtype=torch.int64) for ids in rows], batch_first=True, padding_value=pad_token_id
    )
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]
