"""A judge that is a causal language model asked once: one forward pass, read at the last position."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from frpo.data.conversation import broken_up, control_tokens
from frpo.foundation import require
from frpo.models.loading import require_positions
from frpo.models.policy import DTYPES
from frpo.rewards.base import JudgeIdentity
from frpo.rewards.frozen import Dtype, FrozenModel
from frpo.types import Completion, Judgement


class CausalJudge(FrozenModel):
    """Fills a template with request and response, reads the next-token logits behind it.

    The request is the row's field ``prompt_field``, or the last message of the user; a row without one abstains.
    Set the field where the prompt is an attack and the row keeps what is really asked for. The response is cut to
    ``response_tokens`` tokens of the judge's own tokenizer. Special tokens and the template's own turn markers spelled
    out in either are broken up, so that a completion cannot end its turn and answer for the judge. A question over
    ``max_length`` tokens and logits that are not finite are failed judgements.

    Args:
        path: directory or hub id of a causal language model, or of a PEFT adapter for one (its base is loaded from
            where its adapter_config.json says). A tokenizer must lie beside it.
        revision: commit, tag or branch of ``path`` on the hub.
        dtype: of the weights. Logits are read in float32 and autocast is off whatever it is.
        max_length: tokens of a whole question.
        response_tokens: tokens of a response, 512 as published.
        batch_size: questions per forward pass. Padding, on the left, does not change scores beyond rounding.
        prompt_field: field of the row that holds the request.

    Raises:
        ValueError: at setup, where the tokens that are read are not in its vocabulary, or the model has no weights for
            its head, or fewer positions than ``max_length``.
    """

    reads = "causal language model with a tokenizer"
    cut_side: Literal["left", "right"]
    """Where a response that is too long loses its tokens."""
    markers: tuple[str, ...]
    """What else, beside the special tokens, marks a turn in the template."""

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Dtype = "bfloat16",
        max_length: int = 2048,
        response_tokens: int = 512,
        batch_size: int = 8,
        prompt_field: str | None = None,
    ) -> None:
        super().__init__(path, revision, dtype, batch_size)
        name = type(self).__name__
        self.max_length = require.number(f"{name}.max_length", max_length, at_least=1)
        self.response_tokens = require.number(f"{name}.response_tokens", response_tokens, at_least=1)
        self.prompt_field = prompt_field
        self._tokenizer: Any = None
        self._broken_up: list[str] = []

    @abstractmethod
    def templates(self) -> tuple[str, ...]:
        """The texts the judge can be asked with; their hash is part of its identity."""

    @abstractmethod
    def question(self, request: str, response: str, fields: Mapping[str, Any]) -> str:
        """The template filled in. ``fields`` are the row's, not yet cleaned: pass them through :meth:`plain`."""

    @abstractmethod
    def find_tokens(self, tokenizer: Any) -> None:
        """Look up the tokens that are read, once; ``ValueError`` where the tokenizer has no such tokens."""

    @abstractmethod
    def read(self, logits: Tensor) -> list[Judgement]:
        """One judgement per row of ``logits``, float32 [B, V]."""

    def identity(self) -> JudgeIdentity:
        """The model, its revision, and the hash of the template."""
        return JudgeIdentity.asking(self.path, self.revision, "\0".join(self.templates()))

    def plain(self, text: str) -> str:
        """``text`` with the special tokens and turn markers spelled out in it broken up by a space."""
        return broken_up(text, self._broken_up)

    def load(self) -> Any:
        """See :class:`~frpo.rewards.frozen.FrozenModel`."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            self.path,
            revision=self.revision,
            padding_side="left",
            truncation_side=self.cut_side,
            trust_remote_code=False,
        )
        self.find_tokens(self._tokenizer)
        self._broken_up = control_tokens(self._tokenizer) + list(self.markers)
        path, revision = self.base_model()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=DTYPES[self.dtype],
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model, report = loaded
        self.require_weights(report["missing_keys"], path)
        require_positions(f"{type(self).__name__}.max_length", self.max_length, model.config, self.path)
        return PeftModel.from_pretrained(model, self.path, revision=self.revision) if path != self.path else model

    def base_model(self) -> tuple[str, str | None]:
        """Path and revision of the model itself, which an adapter names."""
        from peft import PeftConfig
        from transformers.utils import find_adapter_config_file

        if find_adapter_config_file(self.path, revision=self.revision) is None:
            return self.path, self.revision
        adapter = PeftConfig.from_pretrained(self.path, revision=self.revision)
        return adapter.base_model_name_or_path, adapter.revision  # an adapter's revision is not its base's

    def encode(self, completion: Completion) -> list[int] | Judgement:
        """Token ids of the question; a row without a request abstains, a question that is too long is failed."""
        request = self._request(completion)
        if request is None:
            missing = "message of the user" if self.prompt_field is None else f"field {self.prompt_field!r}"
            return Judgement.abstain(f"the row has no {missing} to judge by")
        response = self._cut(completion.text)
        question = self.question(self.plain(request), response, completion.prompt.fields)
        ids = self._tokenizer(question)["input_ids"]
        while ids and ids[-1] == self._tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        if len(ids) > self.max_length:
            return Judgement.failed(f"question over max_length={self.max_length} tokens")
        return ids

    def _request(self, completion: Completion) -> str | None:
        if self.prompt_field is not None:
            value = completion.prompt.fields.get(self.prompt_field)
            return None if value is None or value == "" else str(value)
        said = [message["content"] for message in completion.prompt.messages if message["role"] == "user"]
        return said[-1] if said else None

    def _cut(self, text: str) -> str:
        """``text`` cut as the released evaluation code cuts: the tokens that begin or end a sequence count."""
        ids = self._tokenizer(self.plain(text), max_length=self.response_tokens, truncation=True)["input_ids"]
        return self.plain(self._tokenizer.decode(ids, skip_special_tokens=True))

    def score(self, rows: list[list[int]]) -> list[Judgement]:
        """See :class:`~frpo.rewards.frozen.FrozenModel`."""
        return self.read(self._logits(rows))

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Next-token logits behind each row, float32 [len(rows), V]."""
        device = self._model.device
        longest = max(len(ids) for ids in rows)
        padding = self._tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[padding] * (longest - len(ids)) + ids for ids in rows], device=device)
        lengths = torch.tensor([len(ids) for ids in rows], device=device)
        mask = torch.arange(longest, device=device) >= (longest - lengths)[:, None]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,  # a vocabulary of 256 000 at every position would fill the memory
        )
        return output.logits[:, -1].float()
