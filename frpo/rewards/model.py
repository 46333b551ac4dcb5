"""A frozen reward model: a sequence classifier of the transformers library."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from frpo.data.conversation import ConversationEncoder
from frpo.foundation import require
from frpo.models.loading import require_positions
from frpo.models.policy import DTYPES
from frpo.models.scorer import MAX_LENGTH, classifier_logits
from frpo.rewards.base import JudgeIdentity
from frpo.rewards.frozen import Dtype, FrozenModel
from frpo.types import Completion, Judgement

DEFAULT_MAX_LENGTH = 1024
_TRANSFORMS = {"identity": lambda x: x, "sigmoid": torch.sigmoid}


class RewardModel(FrozenModel):
    """``transform(scale * s + shift)`` with ``s`` the output of a frozen classifier for the conversation.

    The model reads the prompt's messages and the completion as the assistant's, through its own tokenizer's chat
    template; without one, the prompt as the policy read it followed by the completion. Special tokens spelled out in
    the text are broken up, so that a completion cannot end its own turn and start another. A conversation over
    ``max_length`` tokens loses its oldest ones (a beginning-of-sequence token stays); a completion that alone does
    not fit is a failed judgement, as is a score that is not finite. Rewards are graded, which is what FRPO gains from;
    mind their scale: lambda is in the same units, so a sigmoid or a ``scale`` is often wanted.

    Args:
        path: directory or hub name of a sequence classifier with one output.
        revision: commit, tag or branch on the hub.
        dtype: of the weights. Scores are float32 and autocast is off whatever it is.
        max_length: tokens; null takes those a model trained by frpo was trained with, 1024 for any other.
        batch_size: conversations per forward pass. Padding does not change scores beyond rounding.
        label: with several outputs, the class whose log-odds are ``s``; ``transform: sigmoid`` then gives its
            probability.
        transform: "identity" or "sigmoid".
        scale: multiplies ``s``.
        shift: is added to it, after ``scale``.
        trust_remote_code: run the Python code that comes with the model. Only for sources you trust.

    Raises:
        ValueError: at setup, a model that is no classifier with one output (or with class ``label``), or has no trained
            head, no padding token, or fewer positions than ``max_length``.
    """

    reads = "sequence classifier"

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Dtype = "float32",
        max_length: int | None = None,
        batch_size: int = 16,
        label: int | None = None,
        transform: Literal["identity", "sigmoid"] = "identity",
        scale: float = 1.0,
        shift: float = 0.0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(path, revision, dtype, batch_size)
        self.max_length = require.number("RewardModel.max_length", max_length, at_least=1)
        self.label = require.number("RewardModel.label", label, at_least=0, hint="the index of a class")
        self.transform = require.one_of("RewardModel.transform", transform, _TRANSFORMS)
        if require.number("RewardModel.scale", scale) == 0:
            raise ValueError("RewardModel.scale: got 0, which makes every reward the same; expected another")
        self.scale = scale
        self.shift = require.number("RewardModel.shift", shift)
        self.trust_remote_code = trust_remote_code
        self._encoder: ConversationEncoder | None = None

    def identity(self) -> JudgeIdentity:
        """The model, its revision, and once it is loaded the hash of its chat template, where it has one."""
        tokenizer = None if self._encoder is None else self._encoder.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            return JudgeIdentity(self.path, self.revision)
        return JudgeIdentity.asking(self.path, self.revision, tokenizer.get_chat_template())

    def load(self) -> Any:
        """See :class:`~frpo.rewards.frozen.FrozenModel`."""
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        source = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        config = AutoConfig.from_pretrained(self.path, **source)
        self._check_outputs(config.num_labels)
        tokenizer = AutoTokenizer.from_pretrained(self.path, **source)
        text_config = config.get_text_config()
        if getattr(text_config, "pad_token_id", None) is None:
            text_config.pad_token_id = tokenizer.pad_token_id
        if text_config.pad_token_id is None and self.batch_size > 1:
            raise ValueError(
                f"RewardModel: got a tokenizer without padding token at {self.path!r}, expected one for "
                f"batch_size={self.batch_size}: write `batch_size: 1`, or save the model with `pad_token_id` in "
                "its config.json"
            )
        if self.max_length is None:
            self.max_length = getattr(config, MAX_LENGTH, DEFAULT_MAX_LENGTH)
        require_positions("RewardModel.max_length", self.max_length, config, self.path)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            self.path,
            config=config,
            dtype=DTYPES[self.dtype],
            output_loading_info=True,
            use_safetensors=True,
            **source,
        )
        self.require_weights(report["missing_keys"], self.path)
        self._encoder = ConversationEncoder(tokenizer, self.max_length)
        return model

    def _check_outputs(self, outputs: int) -> None:
        if self.label is None and outputs != 1:
            raise ValueError(
                f"RewardModel: got {outputs} outputs in {self.path!r}, expected 1: a reward is one number. Write "
                f"`label: <index>`, 0 to {outputs - 1}, to score by the log-odds of one class"
            )
        if self.label is not None and (outputs == 1 or self.label >= outputs):
            raise ValueError(
                f"RewardModel.label: got {self.label} for {self.path!r}, which has {outputs} output(s); expected "
                + ("no label: leave it out" if outputs == 1 else f"an index from 0 to {outputs - 1}")
            )

    def encode(self, completion: Completion) -> list[int] | Judgement:
        """Token ids of the conversation; failed where the completion alone does not fit."""
        assert self._encoder is not None, "setup comes first"
        return self._encoder(completion) or Judgement.failed(f"completion over max_length={self.max_length} tokens")

    def score(self, rows: list[list[int]]) -> list[Judgement]:
        """The transformed outputs; failed where one is not finite."""
        raw = self._raw(classifier_logits(self._model, rows)).cpu()
        scores = _TRANSFORMS[self.transform](self.scale * raw + self.shift)
        finite = (torch.isfinite(raw) & torch.isfinite(scores)).tolist()
        return [
            Judgement.of(score) if ok else Judgement.failed(f"reward model gave {score}")
            for score, ok in zip(scores.tolist(), finite, strict=True)
        ]

    def _raw(self, logits: Tensor) -> Tensor:
        """Scores [N] before scale and shift, of the classifier's outputs [N, classes]."""
        if self.label is None:
            return logits[:, 0]
        others = torch.arange(logits.shape[1], device=logits.device) != self.label
        return logits[:, self.label] - logits[:, others].logsumexp(-1)
