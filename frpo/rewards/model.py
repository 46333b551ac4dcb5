"""A frozen reward model: a sequence classifier of the transformers library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from frpo.data.conversation import MAX_LENGTH, ConversationEncoder, classifier_logits
from frpo.models.loading import reading
from frpo.rewards.base import JudgeIdentity, Reward
from frpo.rewards.calls import require_at_least_one, require_finite
from frpo.types import Completion, Judgement

DEFAULT_MAX_LENGTH = 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TRANSFORMS = {"identity": lambda x: x, "sigmoid": torch.sigmoid}


class RewardModel(Reward):
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
        batch_size: conversations a forward pass. Padding does not change scores beyond rounding.
        label: with several outputs, the class whose log-odds are ``s``; ``transform: sigmoid`` then gives its
            probability.
        transform: "identity" or "sigmoid".
        scale: multiplies ``s``.
        shift: is added to it, after ``scale``.
        trust_remote_code: run the Python code that comes with the model. Only for sources you trust.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_length: int | None = None,
        batch_size: int = 16,
        label: int | None = None,
        transform: Literal["identity", "sigmoid"] = "identity",
        scale: float = 1.0,
        shift: float = 0.0,
        trust_remote_code: bool = False,
    ) -> None:
        for name, value, known in (("dtype", dtype, _DTYPES), ("transform", transform, _TRANSFORMS)):
            if value not in known:
                raise ValueError(f"RewardModel.{name}: got {value!r}, expected one of {sorted(known)}")
        if label is not None and label < 0:
            raise ValueError(f"RewardModel.label: got {label}, expected the index of a class, from 0")
        if require_finite("RewardModel.scale", scale) == 0:
            raise ValueError("RewardModel.scale: got 0, which makes every reward the same; expected another")
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.max_length = None if max_length is None else require_at_least_one("RewardModel.max_length", max_length)
        self.batch_size = require_at_least_one("RewardModel.batch_size", batch_size)
        self.label = label
        self.transform = transform
        self.scale = scale
        self.shift = require_finite("RewardModel.shift", shift)
        self.trust_remote_code = trust_remote_code
        self._model: Any = None
        self._encoder: ConversationEncoder | None = None

    def setup(self, device: torch.device) -> None:
        """Load the model onto ``device``; again, only move it.

        Raises:
            ValueError: the model is no classifier with one output (or with class ``label``), has no trained head,
                no padding token, or fewer positions than ``max_length``.
        """
        if self._model is None:
            with reading(self.path, "sequence classifier"):
                self._load()
        self._model.to(device)

    def identity(self) -> JudgeIdentity:
        """The model, its revision, and once it is loaded the hash of its chat template, where it has one."""
        tokenizer = None if self._encoder is None else self._encoder.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            return JudgeIdentity(self.path, self.revision)
        digest = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
        return JudgeIdentity(self.path, self.revision, digest[:16])

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Score each completion; longest with longest, so that little is padding."""
        if self._model is None:
            raise RuntimeError("RewardModel: called before setup(device), which loads the model")
        rows = [self._encode(completion) for completion in completions]
        judgements = [Judgement.failed(f"completion over max_length={self.max_length} tokens") for _ in completions]
        order = sorted((i for i, ids in enumerate(rows) if ids), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            raw = self._raw_scores([rows[i] for i in indices])
            scores = _TRANSFORMS[self.transform](self.scale * raw + self.shift)
            finite = (torch.isfinite(raw) & torch.isfinite(scores)).tolist()
            for i, score, ok in zip(indices, scores.tolist(), finite, strict=True):
                judgements[i] = Judgement.of(score) if ok else Judgement.failed(f"reward model gave {score}")
        return judgements

    def _load(self) -> None:
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
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is not None and self.max_length > positions:
            raise ValueError(
                f"RewardModel.max_length: got {self.max_length}, expected at most the {positions} positions of "
                f"{self.path!r}"
            )
        model, report = AutoModelForSequenceClassification.from_pretrained(
            self.path,
            config=config,
            dtype=_DTYPES[self.dtype],
            output_loading_info=True,
            use_safetensors=True,
            **source,
        )
        if report["missing_keys"]:
            raise ValueError(
                f"RewardModel: {self.path!r} holds no weights for {sorted(report['missing_keys'])[:3]}, so its "
                "scores would be random; expected a trained sequence classifier, not a language model"
            )
        self._model = model.eval().requires_grad_(False)
        self._encoder = ConversationEncoder(tokenizer, self.max_length)

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

    def _encode(self, completion: Completion) -> list[int]:
        """Token ids of the conversation; none where the completion alone does not fit."""
        assert self._encoder is not None, "setup comes first"
        return self._encoder(completion)

    def _raw_scores(self, rows: list[list[int]]) -> Tensor:
        """Scores before scale and shift, float32 [len(rows)]."""
        device = self._model.device
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            logits = classifier_logits(self._model, rows)
        if self.label is None:
            return logits[:, 0].cpu()
        others = torch.arange(logits.shape[1], device=device) != self.label
        return (logits[:, self.label] - logits[:, others].logsumexp(-1)).cpu()
