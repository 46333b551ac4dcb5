"""The scorer: a sequence classifier with one output on any causal language model, described, loaded and saved."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from frpo.data.conversation import pad_right
from frpo.foundation import require
from frpo.models.export import MERGE_TOLERANCE
from frpo.models.loading import reading, require_positions
from frpo.models.policy import DTYPES, Policy, disable_dropout
from frpo.models.saving import logit_difference, new_directory, probe_logits, require_reloaded, save_tokenizer

MAX_LENGTH = "frpo_max_length"
"""Key of a classifier's config.json: the tokens a conversation had at most in training."""


class Scorer:
    """A language model with a head of one output in place of its vocabulary: what a reward model is trained from.

    Args:
        base: the language model, with or without an adapter: ``adapter: null`` trains every weight, a LoRA adapter
            trains itself and the head. The directory of an earlier reward model goes on from its head.
        max_length: tokens of a conversation; of a longer one the oldest are cut. Scoring takes over the same number.
    """

    def __init__(self, base: Policy, max_length: int = 1024) -> None:
        if base.adapter is not None and base.adapter.path is not None:
            raise ValueError(
                f"Scorer.base.adapter.path: got {base.adapter.path!r}, but an adapter of a language model has no head; "
                "merge it by `frpo export --merge`, and name that directory in `base.init_args.path`"
            )
        self.base = base
        self.max_length = require.number("Scorer.max_length", max_length, at_least=1)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer; it must have a padding token, which is how the end of a row is found."""
        return self.base.tokenizer

    def prepare(self) -> None:
        """Make the base model's files exist."""
        self.base.prepare()

    def load(self) -> Any:
        """The classifier in train mode with every dropout at 0, its adapter attached.

        A fresh head is drawn from the global generator.

        Raises:
            ValueError: the model is a classifier of several outputs, or has fewer positions than ``max_length``.
        """
        base = self.base
        base.prepare()
        config = self.read_config()
        with reading(base.path, "model"):
            model = AutoModelForSequenceClassification.from_pretrained(
                base.path,
                config=config,
                dtype=DTYPES[base.dtype],
                revision=base.revision,
                trust_remote_code=base.trust_remote_code,
                use_safetensors=True,
                attn_implementation=base.attn_implementation,
            )
        if base.adapter is not None:
            model = base.adapter.attach(model, base.revision, task_type="SEQ_CLS")
        return self.ready(model)

    def read_config(self) -> Any:
        """The configuration of the classifier; no weights are read. Raises ``ValueError`` as :meth:`load` says."""
        with reading(self.base.path, "configuration of a model"):
            config = self.base.read_config()
        self._configure(config)
        return config

    def ready(self, model: Any) -> Any:
        """``model`` in train mode with every dropout at 0, recomputing activations where the base asks for it."""
        disable_dropout(model)
        return self.base.ready(model)

    def _configure(self, config: Any) -> None:
        classifier = any("SequenceClassification" in name for name in config.architectures or ())
        if classifier and config.num_labels != 1:
            raise ValueError(
                f"Scorer.base: got a classifier of {config.num_labels} outputs at {self.base.path!r}, expected one "
                "output or a language model: a reward is one number"
            )
        text = config.get_text_config()
        require_positions("Scorer.max_length", self.max_length, config, self.base.path)
        config.num_labels = 1
        # The head reads the last token that is not padding: both must mean the same token by it.
        text.pad_token_id = self.tokenizer.pad_token_id
        setattr(config, MAX_LENGTH, self.max_length)


def save_scorer(model: Any, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> None:
    """Write a trained classifier as a directory that :class:`~frpo.rewards.model.RewardModel` reads.

    An adapter is added to the weights. The directory is read back and compared before it takes the place of an earlier
    one. The weights must be whole, not sharded; of several processes, one alone may call it.

    Raises:
        OSError: it cannot be written; an earlier directory stays.
        ValueError: the weights are not finite, or do not read back or merge; an earlier directory stays.
    """
    out = Path(out).resolve()
    trained = probe_logits(model)
    if not bool(torch.isfinite(trained).all()):
        raise ValueError("the reward model's scores are not finite, so its weights are of no use")
    whole = copy.deepcopy(model).merge_and_unload() if hasattr(model, "peft_config") else model
    merged = probe_logits(whole)
    if not logit_difference(trained, merged) <= MERGE_TOLERANCE:
        raise ValueError(
            f"adding the adapter to the weights moves the scores by {logit_difference(trained, merged):.1e}, expected "
            f"at most {MERGE_TOLERANCE:.0e}: train with `dtype: float32`"
        )
    with new_directory(out.with_name(f".{out.name}.whole")) as staging:
        whole.save_pretrained(staging)
        save_tokenizer(tokenizer, staging)
        read = AutoModelForSequenceClassification.from_pretrained(staging, use_safetensors=True, dtype=whole.dtype)
        require_reloaded(merged, probe_logits(read))
    _replace(out.with_name(f".{out.name}.whole"), out)


def _replace(new: Path, out: Path) -> None:
    """Give a finished directory its name; the earlier one makes room first."""
    earlier = out.with_name(f".{out.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if out.exists():
        out.rename(earlier)
    new.rename(out)
    shutil.rmtree(earlier, ignore_errors=True)


def classifier_logits(model: Any, rows: list[list[int]]) -> Tensor:
    """Outputs [N, classes] of a sequence classifier for ``N`` rows of ids, in float32 or wider."""
    input_ids, mask = pad_right(rows, model.config.get_text_config().pad_token_id or 0)
    device = model.device
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.long().to(device)).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
