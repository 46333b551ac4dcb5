"""One suite run on a policy: rows of this rank, and their means over all ranks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from frpo.data.prompts.batch import EvaluationLoader
from frpo.evaluation.kl import FrozenModels, sequence_kl
from frpo.evaluation.records import Row, quantities
from frpo.evaluation.suite import KL, Suite
from frpo.foundation.redaction import redact_text
from frpo.modules.averages import Averages
from frpo.rewards.base import Reward
from frpo.rewards.scoring import score
from frpo.types import Judgement, RolloutBatch

FAILED = "failed"
Placed = tuple[int, Row]
"""A row with its prompt's place in the suite."""


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated: the policy's model and tokenizer, and after how many optimiser steps."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    step: int
    device: torch.device


def run_suite(
    name: str, suite: Suite, policy: Evaluated, prompts: EvaluationLoader, frozen: FrozenModels
) -> list[Placed]:
    """Answer, judge and measure this rank's ``prompts``; one row per completion.

    Training does not notice: modes of the model's modules and the global random generators are as before afterwards,
    and no gradient is computed. Within, the generators start from the suite's seed, for a reward that draws from them.
    """
    placed: list[Placed] = []
    with isolate_rng(), torch.no_grad(), _eval_mode(policy.model):
        for batch in prompts:
            _seed(suite.seed, int(batch.position[0]))
            rollout = suite.sampler.sample(
                policy.model, policy.tokenizer, batch.to(policy.device), group_size=suite.samples, seed=suite.seed
            )
            scored = {key: score(reward, rollout, on_error="failed") for key, reward in suite.scores.items()}
            kls = {
                key: sequence_kl(policy.model, frozen[path], rollout, suite.batch_size)
                for key, path in suite.kl_to.items()
            }
            records = _records(rollout, suite, {key: value.judgements for key, value in scored.items()}, kls)
            placed += [
                (int(batch.position[i // suite.samples]), {"suite": name, "step": policy.step, **record})
                for i, record in enumerate(records)
            ]
    return placed


def averages(suite: Suite, rows: Iterable[Row], device: torch.device) -> Averages:
    """The means of a suite as a metric: ``compute()`` joins those of all ranks.

    A score's mean is over the completions that have a value, ``<score>/failed`` a share of those that did not abstain;
    the KL's are over completions (``token``: of each completion's mean over its tokens).
    """
    metric = Averages([*suite.quantities, *(f"{key}/{FAILED}" for key in suite.scores)]).to(device)
    for row in rows:
        for quantity, (value, status) in quantities(row).items():
            if status == "value":
                metric.update(quantity, value)
            if quantity in suite.scores and status != "abstain":
                metric.update(f"{quantity}/{FAILED}", float(status == FAILED))
    return metric


def complaints(suite: Suite, rows: Iterable[Row], means: dict[str, float]) -> list[str]:
    """What to warn of: failed judgements with their commonest reason, and scores that have no value at all."""
    reasons: dict[str, Counter[str]] = {key: Counter() for key in suite.scores}
    for row in rows:
        for key, judged in row["scores"].items():
            if judged["status"] == FAILED:
                reasons[key][judged["reason"]] += 1
    found = [
        f"{counter.total()} judgements of {key!r} failed ({means[f'{key}/{FAILED}']:.0%} of those made) and are out of "
        f"its mean; most often: {counter.most_common(1)[0][0] or 'no reason given'}"
        for key, counter in reasons.items()
        if counter
    ]
    return found + [
        f"no completion has a value of {key!r}, so it has no mean" for key in suite.scores if key not in means
    ]


def _records(
    rollout: RolloutBatch, suite: Suite, judged: dict[str, tuple[Judgement, ...]], kls: dict[str, Tensor]
) -> Iterator[Row]:
    flat = {key: total.flatten().tolist() for key, total in kls.items()}
    for i, completion in enumerate(rollout.completions()):
        yield {
            "prompt_id": completion.prompt.id,
            "task": completion.task,
            "sample": i % suite.samples,
            "prompt": completion.prompt_text,
            "completion": completion.text,
            "tokens": completion.length,
            "truncated": completion.truncated,
            "scores": {key: _score(suite.scores[key], judgements[i]) for key, judgements in judged.items()},
            KL: {key: {"sequence": kl[i], "token": kl[i] / completion.length} for key, kl in flat.items()},
        }


def _score(reward: Reward, judgement: Judgement) -> Row:
    judge = reward.identity()
    return {
        "value": judgement.value if judgement.status == "value" else None,
        "status": judgement.status,
        # A judge's complaint may quote the address it was asked at.
        "reason": redact_text(judgement.reason),
        "components": dict(judgement.components),
        "judge": judge.id,
        "revision": judge.revision,
        "template_hash": judge.template_hash,
    }


def _seed(seed: int, position: int) -> None:
    state = int(np.random.SeedSequence((seed, position)).generate_state(1)[0])
    torch.manual_seed(state)
    random.seed(state)
    np.random.seed(state)


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
