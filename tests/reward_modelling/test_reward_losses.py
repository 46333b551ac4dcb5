"""Losses of reward models against float64 loops: values, gradients by finite differences, limits, refusals."""

from __future__ import annotations

import math
import random

import oracles
import pytest
import torch

from frpo.reward_modelling.losses import Binary, BradleyTerry, Regression, RewardLoss

LOSSES = [
    BradleyTerry(),
    BradleyTerry(margin=0.5, centring=0.1),
    Binary(),
    Binary(positive_weight=3.0),
    Regression(),
    Regression("sigmoid"),
]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def oracle(loss: RewardLoss, scores: list[float], target: float) -> float:
    if isinstance(loss, BradleyTerry):
        chosen, rejected = scores
        nll = -math.log(sigmoid(chosen - rejected - loss.margin - target))
        return nll + loss.centring * (chosen + rejected) ** 2
    if isinstance(loss, Binary):
        p = sigmoid(scores[0])
        return -loss.positive_weight * target * math.log(p) - (1 - target) * math.log(1 - p)
    assert isinstance(loss, Regression)
    value = sigmoid(scores[0]) if loss.transform == "sigmoid" else scores[0]
    return (value - target) ** 2


def case(loss: RewardLoss, seed: int) -> tuple[list[list[float]], list[float]]:
    rng = random.Random(seed)
    scores = [[rng.gauss(0, 2) for _ in range(loss.responses)] for _ in range(5)]
    targets = [float(rng.randint(0, 1)) if isinstance(loss, Binary) else rng.random() for _ in range(5)]
    return scores, targets


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{vars(loss)}")
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_are_those_of_the_equations(loss: RewardLoss, seed: int) -> None:
    scores, targets = case(loss, seed)
    given = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    losses = loss(given, torch.tensor(targets, dtype=torch.float64))
    expected = [oracle(loss, row, target) for row, target in zip(scores, targets, strict=True)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-9)
    (gradient,) = torch.autograd.grad(losses.sum(), given)
    for n, (row, target) in enumerate(zip(scores, targets, strict=True)):
        numeric = oracles.finite_difference(lambda x, t=target: oracle(loss, x, t), row)
        assert gradient[n].tolist() == pytest.approx(numeric, abs=1e-6)


def test_far_scores_stay_finite() -> None:
    pair = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = BradleyTerry()(pair, torch.zeros(1))
    assert loss.item() == pytest.approx(2e4)
    (gradient,) = torch.autograd.grad(loss.sum(), pair)
    assert gradient.tolist() == [[-1.0, 1.0]]
    assert Binary()(torch.tensor([[1e4]]), torch.zeros(1)).item() == pytest.approx(1e4)


def test_equal_scores_of_a_pair_cost_log_two() -> None:
    assert BradleyTerry()(torch.ones(1, 2), torch.zeros(1)).item() == pytest.approx(math.log(2))
    assert BradleyTerry(margin=1.0)(torch.tensor([[3.0, 1.0]]), torch.ones(1)).item() == pytest.approx(math.log(2))


def test_what_counts_as_right() -> None:
    pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    assert BradleyTerry().correct(pairs, torch.zeros(3)).tolist() == [1.0, 0.0, 0.5]
    scores = torch.tensor([[2.0], [2.0], [-2.0], [-2.0], [0.0]])
    assert Binary().correct(scores, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 0.0, 1.0, 0.5]
    assert Regression().correct(scores, torch.zeros(5)) is None


def test_what_is_labelled() -> None:
    scores, labels = BradleyTerry().labelled(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2))
    assert (scores.tolist(), labels.tolist()) == ([1.0, 2.0, 3.0, 4.0], [1, 0, 1, 0])
    scores, labels = Binary().labelled(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0]))
    assert (scores.tolist(), labels.tolist()) == ([1.0, 2.0], [0, 1])
    assert Regression().labelled(scores, labels) is None


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (Binary(), 0.5, r"the label: got 0.5, expected one of 0, 1; .*Regression"),
        (Binary(), 2.0, "the label: got 2"),
        (Binary(), math.nan, "the label: got nan"),
        (BradleyTerry(), math.inf, "the margin: got inf"),
        (Regression(), math.nan, "the value: got nan"),
        (Regression("sigmoid"), 1.5, "the value: got 1.5, expected at least 0 and at most 1"),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss: RewardLoss, target: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss.check_target(target)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BradleyTerry(margin=math.nan), "margin: got nan"),
        (lambda: BradleyTerry(centring=-1.0), "centring: got -1.0"),
        (lambda: Binary(positive_weight=0.0), "positive_weight: got 0.0"),
        (lambda: Regression("tanh"), "transform: got 'tanh'"),
    ],
)
def test_bad_settings_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
