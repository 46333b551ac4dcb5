"""Calling a reward so that whatever it returns or raises is a judgement or an error that says where."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar, get_args

from frpo.rewards.base import Reward
from frpo.types import Completion, Judgement, Status

Key = TypeVar("Key")


class RewardError(RuntimeError):
    """A reward raised. The message names the reward and the prompt; the cause is chained."""


class UnusableRewardError(RuntimeError):
    """A reward can judge nothing as it is set up (a key or a model its server refuses): no row is at fault."""


class MalformedJudgementsError(ValueError):
    """A reward returned something other than one judgement per completion: its code is at fault, no row."""


CALL_ERRORS = (RewardError, UnusableRewardError, MalformedJudgementsError)
"""All that :func:`call_reward` raises."""


class RowReward(Reward):
    """A reward that reads one completion at a time: subclass it and write :meth:`judge`.

    FRPO gains over GRPO from graded rewards; with two values it has nothing to add, since policies with equal
    success rates have equal worst cases. Prefer a score in [0, 1] to a pass or fail.
    """

    @abstractmethod
    def judge(self, completion: Completion) -> Judgement:
        """Judge one completion."""

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion; an exception becomes a :class:`RewardError` that names the prompt."""
        return [self._judge(completion) for completion in completions]

    def _judge(self, completion: Completion) -> Judgement:
        try:
            return self.judge(completion)
        except Exception as error:
            raise RewardError(
                f"{type(self).__name__} raised {type(error).__name__} on prompt id={completion.prompt.id!r}, "
                f"task={completion.task!r}: {error}"
            ) from error


def call_reward(reward: Reward, completions: Sequence[Completion]) -> list[Judgement]:
    """``reward(completions)`` as one :class:`~frpo.types.Judgement` per completion.

    A bare number stands for ``Judgement.of(number)``, or for a failure where it is not finite.

    Raises:
        RewardError: the reward raised.
        UnusableRewardError: the reward can judge nothing.
        MalformedJudgementsError: the reward returned the wrong number of judgements, or none at all.
    """
    if not completions and not reward.collective:
        return []
    try:
        results = reward(completions)
    except CALL_ERRORS:
        raise
    except Exception as error:
        tasks = sorted({completion.task for completion in completions})
        first = f" of tasks {tasks}, first prompt id={completions[0].prompt.id!r}" if completions else ""
        raise RewardError(
            f"{type(reward).__name__} raised {type(error).__name__} on {len(completions)} completions{first}: {error}"
        ) from error
    if not isinstance(results, Sequence) or isinstance(results, str):
        raise MalformedJudgementsError(
            f"{type(reward).__name__} returned {type(results).__name__}; expected a list of "
            f"{len(completions)} Judgements, one per completion"
        )
    if len(results) != len(completions):
        raise MalformedJudgementsError(
            f"{type(reward).__name__} returned {len(results)} judgements for {len(completions)} completions; "
            "expected one each, in order: a row without a score is Judgement.abstain or Judgement.failed"
        )
    return [as_judgement(result, type(reward).__name__) for result in results]


def call_each(calls: Mapping[Key, tuple[Reward, Sequence[Completion]]]) -> dict[Key, list[Judgement]]:
    """:func:`call_reward` for each reward and its completions.

    Raises the first error, but only once every collective reward was called: other ranks wait in it for this one.
    """
    judged: dict[Key, list[Judgement]] = {}
    first: Exception | None = None
    for key, (reward, completions) in calls.items():
        if first is not None and not reward.collective:
            continue
        try:
            judged[key] = call_reward(reward, completions)
        except CALL_ERRORS as error:
            first = first or error
    if first is not None:
        raise first
    return judged


def as_judgement(result: Any, source: str) -> Judgement:
    """``result`` of the reward named ``source`` as a judgement; a number that is not finite is a failure."""
    if isinstance(result, Judgement):
        if result.status not in get_args(Status):
            raise MalformedJudgementsError(
                f"{source} returned a Judgement with status {result.status!r}; expected one of "
                f"{list(get_args(Status))}: write Judgement.of, Judgement.abstain or Judgement.failed"
            )
        return result
    if isinstance(result, Real):
        value = float(result)
        return Judgement.of(value) if math.isfinite(value) else Judgement.failed(f"{source} returned {value}")
    raise MalformedJudgementsError(
        f"{source} returned {type(result).__name__} for a completion; expected a Judgement or a number: "
        "write Judgement.of(value), Judgement.abstain(why) or Judgement.failed(why)"
    )
