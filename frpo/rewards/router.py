"""One reward per task of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from frpo.foundation import require
from frpo.foundation.errors import suggestion
from frpo.rewards.base import Reward
from frpo.rewards.calls import call_each
from frpo.types import Completion, Judgement


class Router(Reward):
    """Sends each completion to the reward of its prompt's task: one call per route, the order restored.

    Rewards of different tasks meet in one loss, so bring them to one scale, [0, 1] say. Prefer graded ones:
    with two values FRPO has nothing to add over GRPO. Tasks outside ``routes`` go to ``default``; with none, they
    are an error, raised before the first step by :meth:`check_tasks`.
    """

    def __init__(self, routes: dict[str, Reward], default: Reward | None = None) -> None:
        if "*" in routes:
            raise ValueError("Router.routes: got `*`, which is no task; the reward of all other tasks is `default:`")
        self.routes = require.non_empty("Router.routes", routes, "write a reward by task, as `safety: RefusalPhrases`")
        self.default = default

    def parts(self) -> Mapping[str, Reward]:
        """The rewards by task; ``default`` is named ``*``."""
        return self.routes if self.default is None else {**self.routes, "*": self.default}

    def check_tasks(self, tasks: set[str]) -> None:
        """Raise ``ValueError`` where a task has no route; ask each route about the tasks it will get."""
        for task in sorted(tasks & set(self.routes)):
            self.routes[task].check_tasks({task})
        unrouted = tasks - set(self.routes)
        if unrouted:
            self._rest(min(unrouted)).check_tasks(unrouted)

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion by the reward of its task."""
        rows: dict[str, list[int]] = {}
        for i, completion in enumerate(completions):
            rows.setdefault(completion.task if completion.task in self.routes else "*", []).append(i)
        if "*" in rows:
            self._rest(completions[rows["*"][0]].task)
        judged = call_each(
            {key: (reward, [completions[i] for i in rows.get(key, [])]) for key, reward in self.parts().items()}
        )
        placed: dict[int, Judgement] = {}
        for key, places in rows.items():
            placed.update(zip(places, judged[key], strict=True))
        return [placed[i] for i in range(len(completions))]

    def _rest(self, task: str) -> Reward:
        """The reward of a task without a route."""
        if self.default is None:
            raise ValueError(
                f"Router: got a prompt of task {task!r}, which has no route{suggestion(task, self.routes)}; otherwise "
                f"add a route `{task}:` or a `default:`"
            )
        return self.default
