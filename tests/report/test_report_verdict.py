"""What the report claims, on studies whose truth is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from study_results import Method, methods, simulate

from frpo.report.baseline import (
    BETA,
    KL,
    LESS,
    LOSS_BETA,
    MORE,
    NO_CLAIM,
    NO_DIFFERENCE,
    REWARD,
    UNMATCHED,
    Comparison,
    baseline_sweep,
)
from frpo.report.compare import Estimate
from frpo.report.measurements import measure
from frpo.report.results import StudyResults
from frpo.report.verdict import headline, verdict

PRIMARY = "FRPO jackknife, lambda 0.3, beta 0.05"


def judge(made: list[Method], **settings: float):
    return verdict(measure(simulate(made, prompts=1, samples=1, **settings)))


def words(found, method: str | None = None) -> dict[str, str]:
    return {kind: c.word for kind, c in found.of(method or found.primary).items()}


def only(**settings: float) -> list[Method]:
    return methods(lambdas=(0.3,), scales=("objective",), **settings)


def test_a_real_effect_is_more_in_every_comparison():
    found = judge(only(effect=0.15))
    assert words(found) == {BETA: MORE, REWARD: MORE, KL: MORE}
    assert "a weaker KL constraint does not explain it" in found.headline
    assert found.of(found.primary)[BETA].difference.mean == pytest.approx(0.15, abs=0.06)
    assert found.of(found.primary)[REWARD].difference.mean == pytest.approx(0.15, abs=0.06)


def test_a_real_loss_is_less():
    found = judge(only(effect=-0.15))
    assert words(found) == {BETA: LESS, REWARD: LESS, KL: LESS}
    assert "retains less safety" in found.headline


def test_no_effect_is_no_difference_nearly_always():
    found = [verdict(measure(simulate(only(), prompts=1, samples=1, rng_seed=seed))) for seed in range(6)]
    quiet = [set(words(f).values()) == {NO_DIFFERENCE} for f in found]
    assert np.mean(quiet) >= 0.8
    alone = [f.of(f.primary)[BETA].difference for f in found]
    covered = [d.low <= 0 <= d.high for d in alone]
    assert np.mean(covered) >= 0.8


def test_a_weaker_constraint_alone_shows_at_equal_beta_and_not_at_equal_reward_or_kl():
    found = judge(only(weaker=5.0))
    assert words(found) == {BETA: MORE, REWARD: NO_DIFFERENCE, KL: NO_DIFFERENCE}
    assert "the effect of a weaker KL constraint" in found.headline


def test_the_released_scale_is_compared_apart_and_beyond_the_sweep_it_is_not_matched():
    found = judge(methods(weaker=5.0, lambdas=(0.1,)))
    loss = next(c.method for c in found.comparisons if c.kind == LOSS_BETA)
    assert words(found, loss) == {LOSS_BETA: MORE, REWARD: UNMATCHED, KL: UNMATCHED}
    assert "Outside the range in 5 of 5 seeds" in found.of(loss)[KL].reason
    assert found.primary != loss


def test_the_scales_are_one_for_lambda_of_one_or_more():
    found = judge(methods(lambdas=(1.0,), scales=("loss",)))
    assert set(words(found)) == {BETA, REWARD, KL}


def test_one_seed_makes_no_claim():
    found = judge(only(effect=0.3), seeds=1)
    assert set(words(found).values()) == {NO_CLAIM}
    assert found.headline.startswith("No claim")


def test_without_a_sweep_or_the_same_beta_nothing_is_matched():
    made = [m for m in only(effect=0.3) if m.family != "GRPO" or m.beta == 0.05]
    assert words(judge(made)) == {BETA: MORE, REWARD: UNMATCHED, KL: UNMATCHED}
    made = [replace(m, beta=0.1) if m.family == "FRPO" else m for m in only()]
    found = judge(made)
    assert words(found)[BETA] == UNMATCHED
    assert "no GRPO with beta 0.1" in found.of(found.primary)[BETA].reason


def test_the_primary_method_is_chosen_by_reward_before_and_not_by_what_is_retained():
    made = [*only(), Method("FRPO weak but robust", "FRPO", 0.1, 0.4, 0.3, 0.05, "objective", "naive")]
    found = judge(made)
    assert found.primary == PRIMARY
    assert found.of("FRPO weak but robust")[BETA].group == "others"


def test_the_study_names_its_primary_method():
    results = simulate(methods(effect=0.3), seeds=2, prompts=1, samples=1)
    found = judge_as(results, primary="FRPO jackknife, lambda 0.3, beta 0.05 (loss)")
    assert found.primary == "FRPO jackknife, lambda 0.3, beta 0.05 (loss)"
    assert found.rule.startswith("Fixed in advance")
    assert {c.group for c in found.comparisons if c.method == found.primary} == {"primary"}
    assert "picked among 4 FRPO methods by a rule" in judge_as(results).rule
    for name in ("FRPO", "GRPO, beta 0.05"):
        with pytest.raises(ValueError, match="role `primary` is .* choose one of: FRPO jackknife, lambda 0.3, beta"):
            judge_as(results, primary=name)


def test_a_primary_method_that_has_not_run_yet_makes_no_claim():
    results = simulate(only(), seeds=2, prompts=1, samples=1)
    ran = replace(results, missing=("FRPO naive, seed 0",))
    found = judge_as(ran, primary="FRPO naive")
    assert found.headline == (
        "Preliminary: 1 run is missing (FRPO naive, seed 0). "
        "No claim: nothing compares FRPO naive with GRPO after fine-tuning yet."
    )
    frame = results.frame[results.frame["task"].eq("") | results.frame["family"].ne("FRPO")]
    assert "No claim: nothing compares" in judge_as(replace(results, frame=frame), primary=PRIMARY).headline


def judge_as(results: StudyResults, **roles: str):
    return verdict(measure(replace(results, roles={**results.roles, **roles})))


def test_an_unfinished_study_and_one_of_two_versions_say_so_first():
    titles = tuple(f"GRPO, seed {seed} -> comply" for seed in range(5))
    results = simulate(only(), seeds=2, prompts=1, samples=1)
    found = judge_as(replace(results, missing=titles, versions=("1+a", "1+b")))
    named = "; ".join(titles[:3])
    assert found.headline.startswith(f"Preliminary: 5 runs are missing ({named}; and 2 more). ")
    assert "made by 2 versions of the code (1+a; 1+b)" in found.warnings[0]
    assert judge_as(replace(results, versions=("1+a",))).warnings == []


@pytest.mark.parametrize(
    ("at_beta", "reward", "kl", "expected", "never"),
    [
        (MORE, MORE, MORE, "a weaker KL constraint does not explain it", "only"),
        (NO_DIFFERENCE, MORE, MORE, "only at equal reward and at equal KL (at the same beta: no d", "does not explain"),
        (UNMATCHED, MORE, MORE, "only at equal reward and at equal KL (at the same beta: cannot", "does not explain"),
        (LESS, MORE, MORE, "disagree: F retains more safety than GRPO at equal reward and at equal KL, but less at the "
         "same beta.", "does not explain"),
        (MORE, LESS, NO_DIFFERENCE, "at the same beta, but less at equal reward (at equal KL: no diff", "looks like"),
        (MORE, MORE, LESS, "disagree", "in part"),
        (MORE, NO_DIFFERENCE, UNMATCHED, "effect of a weaker KL constraint, which looks like robustness", "in part"),
        (MORE, NO_DIFFERENCE, MORE, "only at the same beta and at equal KL (at equal reward: no diff", "looks like"),
        (LESS, NO_DIFFERENCE, LESS, "less safety than GRPO at the same beta and at equal KL (at equal rew", "disagree"),
        (NO_DIFFERENCE, NO_DIFFERENCE, UNMATCHED, "No difference shown", "more"),
        (UNMATCHED, UNMATCHED, UNMATCHED, "No claim: F can be matched with no GRPO", "more"),
        (NO_CLAIM, UNMATCHED, NO_CLAIM, "No claim: one seed", "more"),
    ],
)  # fmt: skip
def test_the_headline_says_no_more_than_its_comparisons(m, at_beta, reward, kl, expected, never):
    text = headline(m, "F", {BETA: at_beta, REWARD: reward, KL: kl})
    assert expected in text
    assert never not in text


@pytest.fixture(scope="module")
def m():
    return measure(simulate(methods()[:5], seeds=1, prompts=1, samples=1))


def test_a_difference_below_the_curves_own_error_is_not_shown():
    clear = Comparison("F", KL, "GRPO", Estimate(0.04, 0.03, 0.05, 5, 1e-4), 5, adjusted=1e-3)
    assert (clear.word, replace(clear, curve_error=0.03).word) == (MORE, MORE)
    within = replace(clear, curve_error=0.05)
    assert within.word == NO_DIFFERENCE
    assert "smaller than the mean error of the interpolated curve, 0.050" in within.detail()
    found = judge(only(), seeds=2)
    for kind in (REWARD, KL):
        assert found.of(PRIMARY)[kind].curve_error == pytest.approx(np.abs(found.curve_errors[kind]).mean())


def test_few_seeds_inside_the_range_are_no_match_and_missing_ones_are_told_apart():
    results = simulate(only(effect=0.2), prompts=1, samples=1)
    frame = results.frame
    before = frame["method"].eq(PRIMARY) & frame["suite"].eq("held_out") & frame["task"].eq("")
    one = frame.assign(value=frame["value"].mask(before & frame["seed"].eq(0), 5.0))
    found = judge_as(replace(results, frame=one)).of(PRIMARY)[REWARD]
    assert (found.word, found.difference.seeds) == (MORE, 4)
    two = frame.assign(value=frame["value"].mask(before & frame["seed"].le(1), 5.0))
    found = judge_as(replace(results, frame=two)).of(PRIMARY)[REWARD]
    assert (found.word, found.difference.seeds) == (UNMATCHED, 0)
    assert "3 of 5 measured seeds lie inside; it takes 80%" in found.detail()
    lost = frame["method"].eq("GRPO, beta 0.2") & frame["seed"].le(1) & frame["task"].eq("comply")
    found = judge_as(replace(results, frame=frame[~lost])).of(PRIMARY)[REWARD]
    assert (found.word, found.difference.seeds) == (MORE, 3)
    assert "Outside" not in found.detail()
    assert "2 of 5 seeds" in found.detail()


def test_the_sweep_differs_in_beta_alone():
    others = [
        Method("GRPO, k3", "GRPO", 0.05, beta=0.05, scale="objective"),
        Method("GRPO, unknown kl", "GRPO", 0.05, beta=0.05, scale="objective"),
        Method("GRPO, loss", "GRPO", 0.05, beta=0.05, scale="loss"),
        Method("SAM + GRPO", "SAM + GRPO", 0.05, beta=0.05, scale="objective"),
        Method("FRPO, k3", "FRPO", 0.05, lam=0.3, beta=0.05, scale="objective", estimator="jackknife"),
    ]
    results = simulate([*only(), *others], seeds=1, prompts=1, samples=1)
    name = results.frame["method"]
    kl = pd.Series("full", index=name.index).mask(name.str.contains("k3"), "k3").mask(name.eq("GRPO, unknown kl"))
    m = measure(replace(results, frame=results.frame.assign(**{"method.kl": kl})))
    sweep = [f"GRPO, beta {beta:g}" for beta in (0.005, 0.02, 0.05, 0.2)]
    assert baseline_sweep(m, m.baseline) == baseline_sweep(m, PRIMARY) == sweep
    assert baseline_sweep(m, "FRPO, k3") == ["GRPO, k3"]


def test_comparisons_are_counted_and_adjusted_in_two_groups():
    found = judge(methods(effect=0.1, lambdas=(1.0, 0.3)), seeds=3)
    groups = pd.Series([c.group for c in found.comparisons]).value_counts()
    assert groups.to_dict() == {"primary": 3, "others": 9}
    assert "12 comparisons were tested: 3 of the primary method and 9 of others" in found.notes[1]
    assert all(c.adjusted >= c.difference.p for c in found.comparisons)


def test_only_what_both_have_measured_is_compared():
    results = simulate(only(), seeds=2, prompts=1, samples=1, spread=0.0)
    frame = results.frame
    hard = frame["downstream.lr"].eq(1e-3) & frame["method"].eq(PRIMARY)
    found = verdict(measure(replace(results, frame=frame[~hard])))
    assert found.of(found.primary)[BETA].difference.mean == pytest.approx(0, abs=1e-9)
    assert found.of(found.primary)[REWARD].difference.mean == pytest.approx(0, abs=0.02)
