"""What a reward model of which the head alone is trained makes of labels: a linear probe, scored out of fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frpo.data.conversation import ConversationEncoder, pad_right
from frpo.models.policy import Policy
from frpo.models.scorer import Scorer
from frpo.types import Completion

STRENGTHS = np.logspace(-4, 0, 9)
"""Inverse strengths of the penalty that inner cross-validation chooses from."""
INNER_FOLDS = 5


class LinearProbe:
    """Logistic regression on frozen features: the last layer at the last token of a conversation, as a head reads it.

    Features are computed once and standardised by the training folds; the strength of the penalty is chosen by
    cross-validation inside them.

    Args:
        base: the language model. It is not trained, so it has no adapter.
        max_length: tokens, as in :class:`~frpo.models.scorer.Scorer`.
        batch_size: conversations per forward pass.
    """

    def __init__(self, base: Policy, max_length: int = 1024, batch_size: int = 8) -> None:
        if base.adapter is not None:
            raise ValueError("LinearProbe.base.adapter: got an adapter, expected null: the features are frozen")
        if batch_size < 1:
            raise ValueError(f"LinearProbe.batch_size: got {batch_size}, expected 1 or more")
        self.scorer, self.batch_size = Scorer(base, max_length), batch_size

    def features(self, completions: Sequence[Completion], device: torch.device) -> np.ndarray:
        """Features [N, hidden]; a row of NaN where the completion alone is over ``max_length`` tokens."""
        with torch.random.fork_rng(devices=[]):
            model = self.scorer.load().eval().to(device)
        encoder = ConversationEncoder(self.scorer.tokenizer, self.scorer.max_length)
        rows = [encoder(completion) for completion in completions]
        found = np.full((len(rows), model.config.get_text_config().hidden_size), np.nan)
        order = sorted((i for i, ids in enumerate(rows) if ids), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            found[indices] = pooled(model, [rows[i] for i in indices]).double().cpu().numpy()
        return found

    def out_of_fold(self, features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Probabilities [N] of label 1, each row's from the other folds; NaN where it has no features."""
        valid = np.isfinite(features).all(1)
        scores = np.full(len(labels), np.nan)
        for fold in np.unique(folds):
            held_out, rest = valid & (folds == fold), valid & (folds != fold)
            if held_out.any():
                scores[held_out] = _fit(features[rest], labels[rest]).predict_proba(features[held_out])[:, 1]
        return scores


def pooled(model: Any, rows: list[list[int]]) -> Tensor:
    """What the head of a classifier reads: the last layer [N, hidden] at the last token that is not padding."""
    pad = model.config.get_text_config().pad_token_id
    input_ids, mask = pad_right(rows, pad)
    with torch.inference_mode():
        states = model.base_model(
            input_ids=input_ids.to(model.device), attention_mask=mask.long().to(model.device)
        ).last_hidden_state
    last = torch.where(input_ids != pad, torch.arange(input_ids.shape[1]), 0).argmax(-1)
    return states[torch.arange(len(rows)), last.to(states.device)]


def _fit(features: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = GridSearchCV(
        pipeline, {"logisticregression__C": STRENGTHS}, scoring="neg_log_loss", cv=INNER_FOLDS, error_score="raise"
    )
    return search.fit(features, labels)
