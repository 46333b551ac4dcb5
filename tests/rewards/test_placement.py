"""A reward on chosen ranks judges as it does on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_processes
import runs
import torch

from frpo.rewards.base import JudgeIdentity
from frpo.rewards.calls import MalformedJudgementsError, RewardError, UnusableRewardError, call_reward
from frpo.rewards.compose import Complement, WeightedSum
from frpo.rewards.placement import OnRanks
from frpo.rewards.router import Router
from frpo.types import Completion, Prompt

CPU = torch.device("cpu")


class Loaded(runs.Graded):
    """Notes what it was asked; what it is called is known once it is loaded."""

    def __init__(self, breaks_on: str = "", error: type[Exception] = ValueError) -> None:
        super().__init__(fail_every=3)
        self.breaks_on, self.error = breaks_on, error
        self.loaded = False
        self.asked: list[int] = []

    def setup(self, device: torch.device) -> None:
        if self.breaks_on == "setup":
            raise self.error("no such model")
        self.loaded = True

    def identity(self) -> JudgeIdentity:
        return JudgeIdentity("judge", template_hash="hash" if self.loaded else None)

    def __call__(self, completions):
        assert self.loaded
        self.asked.append(len(completions))
        if any(completion.text == self.breaks_on for completion in completions):
            raise self.error("cannot judge that")
        return super().__call__(completions)


def completions(rank: int, n: int, tasks: tuple[str, ...] = ("even", "odd")) -> list[Completion]:
    prompts = [Prompt(str(i), ({"role": "user", "content": "w0"},), tasks[i % len(tasks)]) for i in range(n)]
    return [Completion(prompt, "w0", f"w{rank} w{i}") for i, prompt in enumerate(prompts)]


def judge(rank: int, ranks: list[int], sizes: list[list[int]]) -> dict:
    inner = Loaded()
    reward = OnRanks(inner, ranks)
    reward.setup(CPU)
    judged = [[(j.status, j.value) for j in call_reward(reward, completions(rank, n[rank]))] for n in sizes]
    return {"judged": judged, "loaded": inner.loaded, "asked": inner.asked, "identity": reward.identity()}


@pytest.mark.parametrize(
    ("ranks", "asked"), [([1], [[], [8, 3, 3]]), ([1, 0], [[4, 1, 1], [4, 2, 2]])], ids=["one", "two"]
)
def test_judgements_are_those_of_the_reward_on_every_rank(tmp_path: Path, ranks, asked) -> None:
    sizes = [[5, 3], [3, 0], [0, 3], [0, 0]]
    both = rank_processes.run(tmp_path, judge, ranks, sizes)
    alone = Loaded()
    alone.setup(CPU)
    for rank, seen in enumerate(both):
        assert seen.status == 0, seen.printed
        for n, judged in zip(sizes, seen.value["judged"], strict=True):
            expected = [(j.status, j.value) for j in call_reward(alone, completions(rank, n[rank]))]
            assert repr(judged) == repr(expected)
        assert seen.value["loaded"] == (rank in ranks)
        assert seen.value["asked"] == asked[rank]
        assert seen.value["identity"] == JudgeIdentity("judge", template_hash="hash")


def composed(rank: int) -> list:
    reward = Router(
        {"even": OnRanks(Loaded(), [0]), "odd": Complement(OnRanks(Loaded(), [1]))},
        default=WeightedSum({"a": OnRanks(Loaded(), [0]), "b": runs.Graded()}, {"a": 0.5, "b": 0.5}),
    )
    reward.setup(CPU)
    mine = [("odd", "even"), ("third",)][rank]  # the tasks of one rank are not those of the other
    first = call_reward(reward, completions(rank, 4, mine))
    second = call_reward(reward, completions(rank, 3, ("even", "third")) if rank else [])
    return [(j.status, j.value, dict(j.components)) for j in [*first, *second]]


def test_a_rank_takes_part_in_the_calls_for_tasks_it_has_no_completion_of(tmp_path: Path) -> None:
    both = rank_processes.run(tmp_path, composed)
    assert [rank.status for rank in both] == [0, 0], both
    plain = Router(
        {"even": Loaded(), "odd": Complement(Loaded())},
        default=WeightedSum({"a": Loaded(), "b": runs.Graded()}, {"a": 0.5, "b": 0.5}),
    )
    plain.setup(CPU)
    rows = [
        completions(0, 4, ("odd", "even")),
        [*completions(1, 4, ("third",)), *completions(1, 3, ("even", "third"))],
    ]
    for rank, mine in zip(both, rows, strict=True):
        assert repr(rank.value) == repr([(j.status, j.value, dict(j.components)) for j in call_reward(plain, mine)])


def failing(rank: int) -> list[str]:
    said = []

    def attempt(reward, rows) -> None:
        try:
            said.append(f"{len(call_reward(reward, rows))} judged")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    for error in (ValueError, UnusableRewardError, MalformedJudgementsError):
        reward = OnRanks(Loaded("w1 w1", error), [0])
        reward.setup(CPU)
        attempt(reward, completions(rank, 2))
    # A part that fails on one rank leaves the other parts in step.
    mixed = WeightedSum({"a": Breaks(rank == 1), "b": OnRanks(Loaded(), [0])}, {"a": 0.5, "b": 0.5})
    mixed.setup(CPU)
    attempt(mixed, completions(rank, 2))
    attempt(mixed, completions(rank, 3))
    try:
        OnRanks(Loaded("setup"), [0]).setup(CPU)
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    try:
        OnRanks(Loaded(), [2]).setup(CPU)
    except ValueError as error:
        said.append(str(error))
    return said


class Breaks(runs.Graded):
    """Raises the first time, where it is to."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks

    def __call__(self, completions):
        breaks, self.breaks = self.breaks, False
        if breaks:
            raise RuntimeError("broken here")
        return super().__call__(completions)


def test_an_error_where_the_model_is_reaches_every_rank(tmp_path: Path) -> None:
    zero, one = rank_processes.run(tmp_path, failing)
    assert zero.status == one.status == 0, zero.printed + one.printed
    for said, kind in zip(one.value, ("RewardError", "UnusableRewardError", "MalformedJudgementsError"), strict=False):
        assert said.startswith(f"{kind}: on rank 0, Loaded: "), said
        assert "cannot judge that" in said
    for said, kind in zip(zero.value, ("RewardError", "UnusableRewardError", "MalformedJudgementsError"), strict=False):
        assert said.startswith(f"{kind}: "), said
        assert "on rank" not in said
    assert zero.value[3:5] == ["2 judged", "3 judged"]
    assert one.value[3].startswith("RewardError: Breaks raised RuntimeError on 2 completions")
    assert one.value[4] == "3 judged"
    assert zero.value[5] == "ValueError: no such model"
    assert one.value[5] == "RewardError: on rank 0, Loaded: ValueError: no such model"
    assert zero.value[6] == one.value[6]
    assert "got [2], expected ranks below 2" in zero.value[6]


def test_one_process_is_the_reward_itself() -> None:
    reward, inner = OnRanks(Loaded(), [3]), Loaded()
    for each in (reward, inner):
        each.setup(CPU)
    rows = completions(0, 5)
    assert repr(call_reward(reward, rows)) == repr(call_reward(inner, rows))
    assert call_reward(reward, []) == []
    assert reward.identity() == inner.identity()
    broken = OnRanks(Loaded("w0 w1"), [0])
    broken.setup(CPU)
    with pytest.raises(RewardError, match="cannot judge that"):
        call_reward(broken, rows)


@pytest.mark.parametrize("ranks", [[], [-1], [0, 0]])
def test_ranks_that_cannot_be_are_refused(ranks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"OnRanks.ranks: got .*, expected different ranks from 0"):
        OnRanks(runs.Graded(), ranks)


def test_one_within_another_is_refused() -> None:
    with pytest.raises(ValueError, match="holds an OnRanks itself"):
        OnRanks(Complement(OnRanks(runs.Graded(), [0])), [0])
