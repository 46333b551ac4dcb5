"""One reward per task of the data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from frpo.rewards.base import JudgeIdentity, Reward
from frpo.rewards.calls import call_each
from frpo.rewards.compose import combined_identity
from frpo.types import Completion, Judgement


class Router(Reward):
    """Sends each completion to the reward of its prompt's task: one call a route, the order restored.

    Rewards of different tasks meet in one loss, so bring them to one scale, [0, 1] say. Prefer graded ones:
    with two values FRPO has nothing to add over GRPO. Tasks outside ``routes`` go to ``default``; with none, they
    are an error, raised before the first step by :meth:`check_tasks`.
    """

    def __init__(self, routes: dict[str, Reward], default: Reward | None = None) -> None:
        if not routes:
            raise ValueError("Router.routes: got none, expected a reward by task, as `safety: {class_path: ...}`")
        self.routes = routes
        self.default = default

    @property
    def collective(self) -> bool:
        """Whether a route is."""
        return any(reward.collective for reward in self._rewards())

    def setup(self, device: torch.device) -> None:
        """Set up every route."""
        for reward in self._rewards():
            reward.setup(device)

    def check_tasks(self, tasks: set[str]) -> None:
        """Raise ``ValueError`` where a task has no route; ask each route about the tasks it will get."""
        for task in sorted(tasks & set(self.routes)):
            self.routes[task].check_tasks({task})
        unrouted = tasks - set(self.routes)
        if unrouted:
            self._route(min(unrouted)).check_tasks(unrouted)

    def identity(self) -> JudgeIdentity:
        """The identities of the rewards by task; that of ``default`` is named ``*``."""
        rewards = self.routes if self.default is None else {**self.routes, "*": self.default}
        return combined_identity("Router", {task: reward.identity() for task, reward in rewards.items()})

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion by the reward of its task."""
        rows: dict[str | None, list[int]] = {}
        for i, completion in enumerate(completions):
            rows.setdefault(completion.task if completion.task in self.routes else None, []).append(i)
        rewards: dict[str | None, Reward] = dict(self.routes.items())
        if None in rows:
            rewards[None] = self._route(completions[rows[None][0]].task)
        elif self.default is not None:
            rewards[None] = self.default
        judged = call_each(
            {key: (reward, [completions[i] for i in rows.get(key, [])]) for key, reward in rewards.items()}
        )
        placed = {
            i: judgement for key, indices in rows.items() for i, judgement in zip(indices, judged[key], strict=True)
        }
        return [placed[i] for i in range(len(completions))]

    def _rewards(self) -> list[Reward]:
        return [*self.routes.values(), *([] if self.default is None else [self.default])]

    def _route(self, task: str) -> Reward:
        reward = self.routes.get(task, self.default)
        if reward is None:
            near = difflib.get_close_matches(task, self.routes, n=1)
            hint = f"did you mean {near[0]!r}? Otherwise add" if near else "add"
            raise ValueError(
                f"Router: got a prompt of task {task!r}, expected one of {sorted(self.routes)}; {hint} a route "
                f"`{task}:` or a `default:`"
            )
        return reward
