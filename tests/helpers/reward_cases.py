"""Completions and rollouts to judge, and rewards that misbehave on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from frpo.rewards.base import Reward
from frpo.types import Completion, Judgement, Prompt, PromptBatch, RolloutBatch


def completion(
    text: str, prompt: str = "Hi", task: str = "t", id: str = "0", length: int = 0, **fields: Any
) -> Completion:
    row = Prompt(id=id, messages=({"role": "user", "content": prompt},), task=task, fields=fields)
    return Completion(prompt=row, prompt_text=f"<user> {prompt}", text=text, length=length)


def rollout(texts: Sequence[Sequence[str]], tasks: Sequence[str] | None = None) -> RolloutBatch:
    """P prompts with G completions each; every completion has two tokens."""
    P, G = len(texts), len(texts[0])
    prompts = tuple(
        Prompt(id=f"row{p}", messages=({"role": "user", "content": f"w{p}"},), task=tasks[p] if tasks else "t")
        for p in range(P)
    )
    batch = PromptBatch(
        prompts=prompts,
        texts=tuple(f"w{p}" for p in range(P)),
        input_ids=torch.ones(P, 1, dtype=torch.long),
        mask=torch.ones(P, 1, dtype=torch.bool),
        position=torch.arange(P),
    )
    return RolloutBatch(
        prompts=batch,
        completion_ids=torch.ones(P, G, 2, dtype=torch.long),
        mask=torch.ones(P, G, 2, dtype=torch.bool),
        logps=torch.zeros(P, G, 2),
        truncated=torch.zeros(P, G, dtype=torch.bool),
        texts=tuple(tuple(row) for row in texts),
    )


class Scripted(Reward):
    """Answers each text with ``answer(text)``, whatever that is; remembers its batches, set-ups and task checks."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer = answer
        self.batches: list[list[str]] = []
        self.devices: list[torch.device] = []
        self.tasks: list[set[str]] = []

    def setup(self, device: torch.device) -> None:
        self.devices.append(device)

    def check_tasks(self, tasks: set[str]) -> None:
        self.tasks.append(tasks)

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        self.batches.append([c.text for c in completions])
        return [self.answer(c.text) for c in completions]


def number_or_status(text: str) -> Judgement:
    """ "0.5" is a value, "abstain" and "failed" what they say, anything else raises."""
    if text == "abstain":
        return Judgement.abstain("does not apply")
    if text == "failed":
        return Judgement.failed("judge timed out")
    return Judgement.of(float(text))


class Slices(Reward):
    """Returns ``count`` judgements, however many completions there are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        return [Judgement.of(1.0)] * self.count


def share_of_vowels(prompt: str, text: str, fields: dict[str, Any]) -> float | None:
    """A function a user might write: None on a row that asks for it, NaN on an empty text, an error on digits."""
    if fields.get("skip"):
        return None
    if text.isdigit():
        raise KeyError("no digits please")
    return sum(letter in "aeiou" for letter in text) / len(text) if text else math.nan
