"""Judges against labels: every reward named is measured, and a probe is trained and measured out of fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.evaluation.agreement import agreement, linked_groups
from frpo.evaluation.intervals import Interval
from frpo.evaluation.probe import LinearProbe
from frpo.rewards.base import Reward
from frpo.rewards.calls import call_reward
from frpo.types import Completion


@dataclass(frozen=True)
class Measured:
    """What was found of one judge: agreement by metric over ``rows`` rows, and how many it gave no value for."""

    rows: int
    failed: int
    abstained: int
    metrics: dict[str, Interval]


class LabelAgreement:
    """Measures judges against labels of 0 and 1.

    Rows that share a prompt or a response are one group: a group is drawn whole in the bootstrap, and stands in one
    fold. Failed judgements and abstentions are counted, and are no part of the metrics.

    Args:
        labels: :class:`~frpo.data.preferences.sources.Labels`, or several sources, one after the other.
        rewards: judges by name; a higher reward means label 1.
        probes: what is trained on the labels themselves and measured out of fold, by name.
        threshold: a reward of at least this much counts as 1.
        folds: of the cross-validation, stratified by label.
        resamples: of the bootstrap.
        seed: of folds and bootstrap.
        device: of the models.
    """

    def __init__(
        self,
        labels: JudgedSource | list[JudgedSource],
        rewards: dict[str, Reward] | None = None,
        probes: dict[str, LinearProbe] | None = None,
        threshold: float = 0.5,
        folds: int = 5,
        resamples: int = 2000,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.sources = labels if isinstance(labels, list) else [labels]
        if not self.sources or any(source.responses != 1 for source in self.sources):
            raise ValueError("labels: expected labelled responses, frpo.data.preferences.sources.Labels say, not pairs")
        self.rewards, self.probes = rewards or {}, probes or {}
        shared = sorted(set(self.rewards) & set(self.probes))
        if shared or not (self.rewards or self.probes):
            found = f"{shared} in both" if shared else "neither"
            raise ValueError(f"rewards and probes: got {found}, expected judges, each under a name of its own")
        for name, value, least in (("folds", folds, 2), ("resamples", resamples, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        self.threshold, self.folds, self.resamples, self.seed = threshold, folds, resamples, seed
        self.device = torch.device(device)

    def measure(self) -> dict[str, Measured]:
        """Read the rows, judge them, and return what was found by judge.

        Raises:
            ValueError: a label is neither 0 nor 1, all are the same, or a judge gave no value for any row.
        """
        examples = self._examples()
        labels = np.array([example.target for example in examples]).astype(int)
        completions = [completion for example in examples for completion in example.completions()]
        groups = linked_groups([str(e.prompt.messages) for e in examples], [c.text for c in completions])
        found: dict[str, Measured] = {}
        for name, reward in self.rewards.items():
            scores, statuses = self._judge(reward, completions)
            found[name] = self._measured(name, scores, labels, groups, statuses)
        if self.probes:
            folds = stratified_folds(labels, groups, self.folds, self.seed)
            for name, probe in self.probes.items():
                scores = probe.out_of_fold(probe.features(completions, self.device), labels, folds)
                found[name] = self._measured(
                    name, scores, labels, groups, Counter(failed=int((~np.isfinite(scores)).sum()))
                )
        return found

    def _examples(self) -> list[JudgedExample]:
        examples = []
        for source in self.sources:
            source.prepare()
            examples += source.examples()
        for example in examples:
            if example.target not in (0.0, 1.0):
                raise ValueError(f"row {example.prompt.id}: the label is {example.target:g}, expected 0 or 1")
        return examples

    def _judge(self, reward: Reward, completions: Sequence[Completion]) -> tuple[np.ndarray, Counter[str]]:
        reward.setup(self.device)
        judgements = call_reward(reward, completions)
        return np.array([j.value for j in judgements]), Counter(j.status for j in judgements)

    def _measured(
        self, name: str, scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, statuses: Counter[str]
    ) -> Measured:
        valid = np.isfinite(scores)
        if not valid.any():
            raise ValueError(f"{name}: gave no value for any of the {len(labels)} rows: {dict(statuses)}")
        _, numbered = np.unique(groups[valid], return_inverse=True)
        metrics = agreement(scores[valid], labels[valid], numbered, self.threshold, self.resamples, self.seed)
        return Measured(int(valid.sum()), statuses["failed"], statuses["abstain"], metrics)


def stratified_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold [N] of each row: whole groups, labels in about the same proportion everywhere."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    found = np.empty(len(labels), dtype=int)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        found[held_out] = fold
    return found
