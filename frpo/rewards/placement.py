"""On which ranks a reward's model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from frpo.rewards.base import JudgeIdentity, Reward
from frpo.rewards.calls import CALL_ERRORS, RewardError, UnusableRewardError, call_reward
from frpo.types import Completion, Judgement

Result = TypeVar("Result")


class OnRanks(Reward):
    """``reward`` loaded on the chosen ranks alone, which judge the completions of all ranks.

    The chosen ranks share the completions of a call evenly; judgements come back in order. It frees the memory of the
    reward's models on the other ranks, and costs time: they wait until all is judged, and so does the first rank to be
    done with its completions. Worth it for a model that does not fit beside the policy on every rank; a smaller one is
    faster on every rank, and a rule or a judge asked over HTTP gains nothing. With one process it is ``reward`` itself.

    Every rank takes part in every call, with no completions where need be. :class:`~frpo.rewards.router.Router`, the
    rewards of :mod:`frpo.rewards.compose` and evaluation suites see to that; a class of your own around it must call it
    once whenever it is called, whatever the completions, and say so in :attr:`collective`. Where ``reward`` raises,
    every rank does, and the error names the rank; under ``on_reward_error: failed`` all completions of the call fail.

    Example: ``OnRanks(RewardModel("allenai/Llama-3.1-8B-Instruct-RM-RB2"), ranks=[0])``.

    Args:
        reward: judges.
        ranks: which load it, counted over all machines from 0.

    Raises:
        ValueError: no rank, one twice or below 0; at setup, one beyond the last. A ``reward`` that holds an OnRanks.
    """

    def __init__(self, reward: Reward, ranks: list[int]) -> None:
        if not ranks or min(ranks) < 0 or len(set(ranks)) < len(ranks):
            raise ValueError(f"OnRanks.ranks: got {ranks}, expected different ranks from 0, as [0]")
        if reward.collective:
            raise ValueError("OnRanks.reward: got a reward that holds an OnRanks itself; keep one of the two")
        self.reward, self.ranks = reward, sorted(ranks)
        self._identity: JudgeIdentity | None = None
        self._calls = 0

    def parts(self) -> Mapping[str, Reward]:
        """The one reward, also on ranks that do not load it."""
        return {"of": self.reward}

    @property
    def collective(self) -> bool:
        """True."""
        return True

    def setup(self, device: torch.device) -> None:
        """Set up the reward where it is chosen."""
        number = _world()
        if number == 1:
            return self.reward.setup(device)
        if self.ranks[-1] >= number:
            raise ValueError(f"OnRanks.ranks: got {self.ranks}, expected ranks below {number}, the number there are")

        def build() -> JudgeIdentity:
            if dist.get_rank() in self.ranks:
                self.reward.setup(device)
            return self.reward.identity()

        # A model that is loaded may know more of itself; every rank has to name the judge alike.
        self._identity = self._together(build)[self.ranks[0]]
        return None

    def identity(self) -> JudgeIdentity:
        """That of the reward on the first of its ranks."""
        return self.reward.identity() if self._identity is None else self._identity

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion, whichever rank it is on.

        Raises:
            RewardError, UnusableRewardError, MalformedJudgementsError: as the reward, on every rank.
        """
        if _world() == 1:
            return call_reward(self.reward, completions)
        parts = self._together(lambda: list(completions))
        everyones = [completion for part in parts for completion in part]
        shares = self._together(lambda: call_reward(self.reward, everyones[self._share(len(everyones))]))
        judgements = [judgement for share in shares for judgement in share]
        first = sum(len(part) for part in parts[: dist.get_rank()])
        return judgements[first : first + len(completions)]

    def _share(self, rows: int) -> slice:
        """This rank's part of ``rows`` completions; parts follow each other in the order of the ranks."""
        if dist.get_rank() not in self.ranks:
            return slice(0, 0)
        place, sharers = self.ranks.index(dist.get_rank()), len(self.ranks)
        return slice(place * rows // sharers, (place + 1) * rows // sharers)

    def _together(self, make: Callable[[], Result]) -> list[Result]:
        """What ``make`` gives on each rank. What it raises on one is raised on all, so that none waits for it."""
        self._calls += 1
        made: Result | None = None
        raised: Exception | None = None
        try:
            made = make()
        except Exception as error:
            raised = error
        kind = type(raised) if isinstance(raised, CALL_ERRORS) else RewardError
        failure = None if raised is None else (kind, f"{type(raised).__name__}: {raised}")
        everyones: list[Any] = [None] * _world()
        dist.all_gather_object(everyones, (self._calls, failure, made))
        if raised is not None:
            raise raised
        for rank, (calls, failure, _) in enumerate(everyones):
            if calls != self._calls:
                raise UnusableRewardError(
                    f"OnRanks: rank {rank} is at exchange {calls}, this one at {self._calls}: the reward around it "
                    "must call it once in each of its own calls, on every rank, with no completions too"
                )
            if failure is not None:
                raise failure[0](f"on rank {rank}, {type(self.reward).__name__}: {failure[1]}")
        return [made for _, _, made in everyones]


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
