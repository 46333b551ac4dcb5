from __future__ import annotations

import random
from typing import Any

import evaluation_toys as toys
import numpy as np
import pytest
import runs
import torch

from frpo.data.prompts.batch import EvaluationLoader
from frpo.evaluation.kl import FrozenModels
from frpo.evaluation.runner import Evaluated, averages, complaints, run_suite
from frpo.evaluation.suite import Suite
from frpo.models.policy import LoRA, Policy
from frpo.rewards.base import Reward
from frpo.types import Judgement

CPU = torch.device("cpu")


def policy(model_dir, noise: float = 0.0, **settings: Any) -> Evaluated:
    described = Policy(str(model_dir), dtype="float64", **settings)
    model = described.load()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return Evaluated(model, described.tokenizer, 3, CPU)


def run(suite: Suite, what: Evaluated, ranks: int = 1) -> list[dict[str, Any]]:
    rows = suite.load("s", what.tokenizer)
    frozen = FrozenModels()
    for path in suite.kl_to.values():
        frozen.load(path, Policy(path, dtype="float64"), what.model, CPU)
    placed = []
    for rank in range(ranks):
        loader = EvaluationLoader(rows, batch_size=suite.batch_size, pad_token_id=0, world_size=ranks, rank=rank)
        placed += run_suite("s", suite, what, loader, frozen)
    return [row for _, row in sorted(placed, key=lambda item: (item[0], item[1]["sample"]))]


def test_rows_do_not_depend_on_batches_ranks_or_random_state(model_dir):
    what = policy(model_dir)
    expected = run(toys.drawn(), what)
    torch.manual_seed(99)
    assert run(toys.drawn(batch_size=2), what) == expected
    assert run(toys.drawn(batch_size=2), what, ranks=2) == expected
    assert run(toys.drawn(seed=1), what) != expected


def test_kl_is_the_sum_over_the_vocabulary_along_the_completion(model_dir):
    """Against a loop over prefixes in float64, one sequence at a time and without padding."""
    what = policy(model_dir, noise=0.05)
    start = Policy(str(model_dir), dtype="float64").load_base()
    rows = run(toys.drawn(kl_to={"start": str(model_dir)}), what)
    encoded = {row.prompt.id: row.ids for row in toys.drawn().load("s", what.tokenizer)}
    words = what.tokenizer.get_vocab()
    # The text shows every token but the end, unless special tokens were drawn amid it.
    readable = [row for row in rows if len(row["completion"].split()) == row["tokens"] - (not row["truncated"])]
    assert len(readable) > 5
    for row in readable:
        ids = [words[word] for word in row["completion"].split()]
        total = 0.0
        for t in range(row["tokens"]):
            prefix = torch.cat([encoded[row["prompt_id"]], torch.tensor(ids[:t], dtype=torch.int64)])[None]
            with torch.no_grad():
                p, q = (m(input_ids=prefix).logits[0, -1].double().log_softmax(-1) for m in (what.model, start))
            total += float((p.exp() * (p - q)).sum())
        assert row["kl"]["start"]["sequence"] == pytest.approx(total, rel=1e-6)
        assert row["kl"]["start"]["token"] == pytest.approx(total / row["tokens"], rel=1e-6)
        assert total > 1e-3


def test_kl_of_an_adapter_to_its_base(model_dir):
    what = policy(model_dir, adapter=LoRA(r=2, alpha=4))
    assert all(
        abs(row["kl"]["base"]["sequence"]) < 1e-9 for row in run(toys.suite(kl_to={"base": str(model_dir)}), what)
    )


def test_a_model_of_another_vocabulary_is_refused(model_dir):
    what = policy(model_dir)
    what.model.config.vocab_size = 47
    with pytest.raises(ValueError, match="has a vocabulary of 46, the policy one of 47"):
        FrozenModels().load(str(model_dir), None, what.model, CPU)


def test_frozen_models_are_shared(model_dir):
    what, models = policy(model_dir), FrozenModels()
    first = models.load(str(model_dir), None, what.model, CPU)
    assert models.load(str(model_dir), None, what.model, CPU) is first
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.training


class Dice(Reward):
    """A score that draws from every global generator."""

    def __call__(self, completions):
        return [Judgement.of(random.random() + np.random.random() + float(torch.rand(()))) for _ in completions]


def test_the_policy_and_the_generators_are_as_before(model_dir):
    what = policy(model_dir)
    what.model.train()
    what.model.model.layers[0].eval()
    parameter = next(what.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in what.model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = run(toys.drawn(scores={"dice": Dice()}, kl_to={"start": str(model_dir)}), what)
    assert [module.training for module in what.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    random.seed(5)
    assert run(toys.drawn(scores={"dice": Dice()}, kl_to={"start": str(model_dir)}), what) == first


class Moody(Reward):
    """A value, a failure, an abstention in turn by prompt; ``raising`` raises instead of failing."""

    def __init__(self, raising: bool = False) -> None:
        self.raising = raising

    def __call__(self, completions):
        found = []
        for completion in completions:
            turn = int(completion.prompt.id) % 3
            if turn == 1 and self.raising:
                raise RuntimeError("no judge")
            found.append(
                [Judgement.of(0.5, {"part": float("nan")}), Judgement.failed("late"), Judgement.abstain("no")][turn]
            )
        return found


@pytest.mark.parametrize("raising", [False, True])
def test_failures_are_counted_and_are_no_numbers(model_dir, raising):
    suite = toys.suite(scores={"moody": Moody(raising), "graded": runs.Graded()})
    rows = run(suite, policy(model_dir))
    assert [row["scores"]["moody"]["status"] for row in rows[:3]] == ["value", "failed", "abstain"]
    assert [row["scores"]["moody"]["value"] for row in rows[:3]] == [0.5, None, None]
    means = averages(suite, rows, CPU).compute()
    assert means["moody"] == 0.5
    assert means["moody/failed"] == pytest.approx(2 / 5)  # 7 prompts: 3 values, 2 failures, 2 abstentions
    assert means["graded/failed"] == 0
    (said,) = complaints(suite, rows, means)
    assert said.startswith("2 judgements of 'moody' failed (40% of those made)")
    assert ("no judge" if raising else "late") in said


def test_a_score_without_any_value_has_no_mean(model_dir):
    suite = toys.suite(scores={"all": Moody()})
    rows = [row for row in run(suite, policy(model_dir)) if row["scores"]["all"]["status"] == "failed"]
    means = averages(suite, rows, CPU).compute()
    assert means == {"all/failed": 1.0}
    assert complaints(suite, rows, means)[1] == "no completion has a value of 'all', so it has no mean"
