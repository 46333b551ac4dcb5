import math

import numpy as np
import pytest
import torch
from reward_cases import Scripted, Slices, number_or_status, rollout

from frpo.rewards.calls import MalformedJudgementsError, RewardError, RowReward, UnusableRewardError
from frpo.rewards.compose import WeightedSum
from frpo.rewards.router import Router
from frpo.rewards.scoring import JudgementCounts, TwoValuedWatch, check_failure_rate, count_judgements, score
from frpo.types import Judgement


def test_only_values_enter_the_rewards():
    scored = score(Scripted(number_or_status), rollout([["0.5", "failed"], ["abstain", "-2"]]))
    assert scored.rewards.dtype == torch.float64
    assert scored.rewards.tolist() == [[0.5, 0.0], [0.0, -2.0]]
    assert scored.reward_mask.tolist() == [[True, False], [False, True]]
    assert [j.status for j in scored.judgements] == ["value", "failed", "abstain", "value"]


@pytest.mark.parametrize("number", [1, 0.25, True, np.float32(0.25), np.int64(3)])
def test_a_bare_number_is_a_value(number):
    scored = score(Scripted(lambda _: number), rollout([["a", "b"]]))
    assert scored.rewards.tolist() == [[float(number)] * 2]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_a_failure_and_no_zero(number):
    scored = score(Scripted(lambda t: number if t == "a" else 1.0), rollout([["a", "b"]]))
    assert scored.reward_mask.tolist() == [[False, True]]
    assert (scored.judgements[0].status, scored.judgements[0].reason) == ("failed", f"Scripted returned {number}")


@pytest.mark.parametrize("on_error", ["raise", "failed"])
@pytest.mark.parametrize("count", [0, 3, 5])
def test_the_wrong_number_of_judgements_is_refused(count, on_error):
    with pytest.raises(ValueError, match=f"Slices returned {count} judgements for 4 completions; expected one each"):
        score(Slices(count), rollout([["a", "b"], ["c", "d"]]), on_error=on_error)


@pytest.mark.parametrize("result", [None, "0.5", torch.tensor(0.5), [0.5]])
def test_what_is_neither_judgement_nor_number_is_refused(result):
    with pytest.raises(MalformedJudgementsError, match=f"returned {type(result).__name__} for a completion"):
        score(Scripted(lambda _: result), rollout([["a"]]))


def test_a_judgement_with_a_status_of_its_own_is_refused():
    with pytest.raises(MalformedJudgementsError, match="status 'ok'; expected one of"):
        score(Scripted(lambda _: Judgement("ok", 1.0)), rollout([["a"]]))


def test_no_list_at_all_is_refused():
    class Lazy(Scripted):
        def __call__(self, completions):
            return (Judgement.of(1.0) for _ in completions)

    with pytest.raises(MalformedJudgementsError, match="Lazy returned generator; expected a list of 1 Judgements"):
        score(Lazy(None), rollout([["a"]]))


def test_an_exception_stops_with_the_reward_and_the_prompts():
    with pytest.raises(
        RewardError, match=r"Scripted raised ValueError on 2 completions of tasks \['x'\], first"
    ) as caught:
        score(Scripted(number_or_status), rollout([["1", "bad"]], tasks=["x"]))
    assert "prompt id='row0'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


class PickyRow(RowReward):
    def judge(self, completion):
        return number_or_status(completion.text)


def test_an_exception_in_a_row_names_the_row_through_every_composition():
    reward = Router({"x": WeightedSum({"picky": PickyRow()}, {"picky": 1.0})}, default=PickyRow())
    for tasks in (["x", "y"], ["y", "x"]):
        message = rf"^PickyRow raised ValueError on prompt id='row1', task='{tasks[1]}'"
        with pytest.raises(RewardError, match=message):
            score(reward, rollout([["1", "2"], ["3", "bad"]], tasks=tasks))


@pytest.mark.parametrize("on_error", ["raise", "failed"])
def test_a_malformed_part_is_refused_through_every_composition(on_error):
    reward = Router({"t": WeightedSum({"short": Slices(1)}, {"short": 1.0})})
    with pytest.raises(MalformedJudgementsError, match="^Slices returned 1 judgements for 2 completions"):
        score(reward, rollout([["a", "b"]]), on_error=on_error)


@pytest.mark.parametrize("on_error", ["raise", "failed"])
def test_a_reward_that_can_judge_nothing_stops_under_either_setting(on_error):
    def refused(text):
        raise UnusableRewardError("the key is refused")

    reward = Router({"t": WeightedSum({"judge": Scripted(refused)}, {"judge": 1.0})})
    with pytest.raises(UnusableRewardError, match="^the key is refused"):
        score(reward, rollout([["a", "b"]]), on_error=on_error)


@pytest.mark.parametrize("reward", [PickyRow(), Scripted(number_or_status)])
def test_an_exception_fails_its_own_row_only_where_asked(reward):
    scored = score(reward, rollout([["1", "bad"], ["3", "4"]]), on_error="failed")
    assert scored.reward_mask.tolist() == [[True, False], [True, True]]
    assert scored.rewards.tolist() == [[1.0, 0.0], [3.0, 4.0]]
    assert "raised ValueError" in scored.judgements[1].reason
    assert "bad" in scored.judgements[1].reason


def test_interrupts_are_not_swallowed():
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Scripted(interrupt), rollout([["a"]]), on_error="failed")


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="on_error: got 'zero', expected one of raise, failed"):
        score(Slices(1), rollout([["a"]]), on_error="zero")


# Counts and caps


def test_counts_and_reasons():
    judgements = [Judgement.of(1.0), Judgement.abstain("n/a"), *[Judgement.failed("slow")] * 2, Judgement.failed("")]
    counts = count_judgements(judgements)
    assert (counts.n_total, counts.n_failed, counts.n_abstained) == (5, 3, 1)
    assert counts.reasons == (("slow", 2), ("", 1))
    assert counts.failure_rate == 3 / 4, "abstentions are in neither count"


def test_the_failure_cap_stops_with_reasons():
    check_failure_rate(JudgementCounts(4, 1, 0), 0.25)
    check_failure_rate(JudgementCounts(4, 0, 4), 0.0)
    check_failure_rate(JudgementCounts(4, 4, 0), 1.0)
    with pytest.raises(RewardError, match=r"2 of 4 judgements failed \(50%\).*max_failure_rate=25%.*2 x slow"):
        check_failure_rate(JudgementCounts(4, 2, 0, (("slow", 2),)), 0.25)
    with pytest.raises(RewardError, match=r"1 of 2 judgements failed .*none on this rank"):
        check_failure_rate(JudgementCounts(10, 1, 8), 0.25)


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_a_cap_outside_zero_and_one_is_refused(rate):
    with pytest.raises(ValueError, match="max_failure_rate: got .*at least 0 and at most 1"):
        check_failure_rate(JudgementCounts(4, 0, 0), rate)


# Two-valued rewards


def test_two_values_are_said_once_when_enough_were_seen():
    watch = TwoValuedWatch(patience=6)
    rewards, mask = torch.tensor([[0.0, 1.0], [1.0, 0.5]]), torch.tensor([[True, True], [True, False]])
    assert watch.observe(rewards, mask) is None
    warning = watch.observe(rewards, mask)
    assert warning is not None
    assert "all 6 rewards seen so far are one of [0.0, 1.0]" in warning
    assert watch.observe(rewards, mask) is None


def test_a_third_value_silences_for_good():
    watch = TwoValuedWatch(patience=3)
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert watch.observe(torch.tensor([[0.0, 1.0]]), everything) is None
    assert watch.observe(torch.tensor([[0.5, 1.0]]), everything) is None
    assert not watch.two_valued
    for _ in range(9):
        assert watch.observe(torch.tensor([[0.0, 1.0]]), everything) is None
