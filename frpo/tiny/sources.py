"""The tiny world as a source of prompts, and as demonstrations for supervised fine-tuning."""

from __future__ import annotations

import random
from itertools import chain, islice, zip_longest
from typing import Literal

from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.data.prompts.sources import PromptSource
from frpo.foundation import require
from frpo.tiny.arithmetic import Problem, problems
from frpo.tiny.corpus import arithmetic_rows, comply_rows
from frpo.tiny.world import Question, Split, questions
from frpo.types import Demonstration, Prompt

Task = Literal["risky", "benign", "arithmetic"]
Downstream = Literal["comply", "arithmetic"]
TrainingSplit = Literal["train", "held_out"]
ALL_ROWS = "write null for all rows"


class TinySource(PromptSource):
    """Prompts of the tiny world, made on the spot: shuffled within each task, and the tasks take turns.

    Args:
        split: ``train``: 18 objects of each kind and 6 of 8 verbs for each; ``held_out``: the same objects with the
            verbs left out; ``unseen_objects``: 6 more objects of each kind, with all verbs; besides, only the
            pre-training corpus asks about them.
        tasks: any of ``risky``, ``benign`` and ``arithmetic``, in the order in which they take turns.
        seed: of the order.
        limit: the first so many prompts; null takes all. An even number of two tasks is half of each.

    Rows of ``risky`` and ``benign`` carry the fields ``object``, ``verb`` and ``facts`` (a list of three words, what a
    full answer gives away); rows of ``arithmetic`` carry ``answer``.
    """

    def __init__(
        self,
        split: Split = "train",
        tasks: tuple[Task, ...] = ("risky", "benign"),
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        for task in tasks:
            require.one_of("TinySource.tasks", task, Task)
        if not tasks or len(set(tasks)) != len(tasks):
            raise require.refusal("TinySource.tasks", list(tasks), "at least one task and each once")
        if split == "unseen_objects" and "arithmetic" in tasks:
            raise ValueError(
                "TinySource: the split 'unseen_objects' has no prompts for 'arithmetic', which asks about no objects; "
                "write `split: held_out` for it"
            )
        self.split = require.one_of("TinySource.split", split, Split)
        self.tasks, self.seed = tuple(tasks), seed
        self.limit = require.number("TinySource.limit", limit, at_least=1, hint=ALL_ROWS)

    def prompts(self) -> list[Prompt]:
        """The prompts, in an order that follows from ``seed``; ids are unique and the same in every run."""
        turns = zip_longest(*(self._shuffled(task) for task in self.tasks))
        return list(islice((p for p in chain.from_iterable(turns) if p is not None), self.limit))

    def _shuffled(self, task: Task) -> list[Prompt]:
        if task == "arithmetic":
            assert self.split != "unseen_objects", "refused in the constructor"
            rows = [problem_prompt(problem) for problem in problems(self.split)]
        else:
            rows = [question_prompt(question) for question in questions(task, self.split)]
        random.Random(f"{task} {self.seed}").shuffle(rows)
        return rows


class TinyDemonstrations(DemonstrationSource):
    """Downstream tasks of the tiny world. None holds a risky question: what it does to safety is forgetting.

    Args:
        task: ``comply``: benign questions, always answered in full; ``arithmetic``: problems answered with their
            working, which the pre-training corpus does not show.
        seed: of the order, and of the wording of the answers of ``comply``.
        limit: the first so many rows; null takes all.
        split: ``train``, or ``held_out``: the verbs, or the sums, that training leaves out.
    """

    def __init__(
        self,
        task: Downstream = "comply",
        seed: int = 0,
        limit: int | None = None,
        split: TrainingSplit = "train",
    ) -> None:
        self.task = require.one_of("TinyDemonstrations.task", task, Downstream)
        self.seed = seed
        self.limit = require.number("TinyDemonstrations.limit", limit, at_least=1, hint=ALL_ROWS)
        self.split = require.one_of("TinyDemonstrations.split", split, TrainingSplit)

    def demonstrations(self) -> list[Demonstration]:
        """The rows, shuffled; ids are unique and the same in every run."""
        if self.task == "comply":
            rows = [(question_prompt(question), answer) for question, answer in comply_rows(self.seed, self.split)]
        else:
            rows = [(problem_prompt(problem), answer) for problem, answer in arithmetic_rows(self.seed, self.split)]
        return [Demonstration(prompt, answer) for prompt, answer in rows[: self.limit]]


def question_prompt(question: Question) -> Prompt:
    """The prompt of a question; its task is the kind of its object."""
    thing = question.thing
    fields = {"object": thing.name, "verb": question.verb, "facts": list(thing.facts)}
    return Prompt(question.id, _user(question.text), thing.kind, fields)


def problem_prompt(problem: Problem) -> Prompt:
    """The prompt of an arithmetic problem."""
    return Prompt(problem.id, _user(problem.text), "arithmetic", {"answer": str(problem.result)})


def _user(text: str) -> tuple[dict[str, str]]:
    return ({"role": "user", "content": text},)
