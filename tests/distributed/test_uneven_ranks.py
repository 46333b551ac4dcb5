"""Ranks with very different prompts and rewards: none waits for another, and two train what one does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import sharded_runs

from frpo.data.prompts.module import PromptDataModule
from frpo.data.prompts.sources import PromptSource
from frpo.rewards.base import Reward
from frpo.rewards.placement import OnRanks
from frpo.rewards.router import Router
from frpo.types import Completion, Judgement, Prompt

pytestmark = pytest.mark.filterwarnings("ignore")

GLOBAL_BATCH = 8  # rows 0 to 3 of it are rank 0's, rows 4 to 7 rank 1's
STEPS = 4


class Uneven(PromptSource):
    """In every global batch the prompts of rank 0 are short and those of rank 1 long; each rank has its own tasks."""

    def __init__(self, n: int) -> None:
        self.n = n

    def prompts(self) -> Sequence[Prompt]:
        def text(i: int) -> str:
            return " ".join(f"w{(7 * i + j) % 40}" for j in range(1 if i % GLOBAL_BATCH < 4 else 30))

        return [
            Prompt(str(i), ({"role": "user", "content": text(i)},), "even" if i % GLOBAL_BATCH < 4 else "odd")
            for i in range(self.n)
        ]


class Patchy(Reward):
    """By global step: one group without any value; all of rank 1 failed; all abstained on rank 0; all of all failed."""

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        return [self._judge(c, g) for c, g in zip(completions, runs.Graded()(completions), strict=True)]

    def _judge(self, completion: Completion, graded: Judgement) -> Judgement:
        step, row = divmod(int(completion.prompt.id), GLOBAL_BATCH)
        if (step == 0 and row == 5) or (step == 1 and row >= 4) or step == 3:
            return Judgement.failed("planted")
        return Judgement.abstain("planted") if step == 2 and row < 4 else graded


def data(batch_size: int) -> PromptDataModule:
    return PromptDataModule(
        train=Uneven(STEPS * GLOBAL_BATCH),
        val=Uneven(3),  # one on rank 0, two on rank 1
        batch_size=batch_size,
        max_prompt_length=40,
        shuffle=False,
    )


@pytest.fixture(scope="module")
def alone(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    make = partial(sharded_runs.lora, model_dir, reward=Patchy(), epochs_per_rollout=1)
    return sharded_runs.run(make, data, tmp_path_factory.mktemp("alone") / "1.pt", max_steps=STEPS)


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    for name, value in one["weights"].items():
        assert (value - two["weights"][name]).abs().max() < 1e-6, name
    assert len(one["rows"]) == len(two["rows"]) == STEPS
    for first, second in zip([*one["rows"], one["held_out"]], [*two["rows"], two["held_out"]], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_uneven_ranks_equal_one_process(model_dir: Path, tmp_path: Path, alone, kind: str) -> None:
    make = partial(sharded_runs.lora, model_dir, reward=Patchy(), epochs_per_rollout=1)
    two = sharded_runs.run(make, data, tmp_path / "2.pt", kind, max_steps=STEPS)
    assert_equal(alone, two)
    assert {"val/reward/even", "train/failed", "train/abstained"} <= set(two["held_out"]) | set(two["rows"][-1])


def test_a_reward_on_one_rank_trains_the_same(model_dir: Path, tmp_path: Path, alone) -> None:
    """Each rank has completions of one task only, and still takes part in judging the other."""
    reward = Router({"even": OnRanks(Patchy(), [1]), "odd": OnRanks(Patchy(), [0, 1])})
    make = partial(sharded_runs.lora, model_dir, reward=reward, on_reward_error="failed", epochs_per_rollout=1)
    two = sharded_runs.run(make, data, tmp_path / "2.pt", "ddp", max_steps=STEPS)
    assert_equal(alone, two)
