"""``frpo fit`` on two ranks of which one fails: both end within seconds, and the user reads the first error.

``FRPO_TEST_RANKS=all`` runs every launcher and place (some ten minutes on one core).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import rank_failures

FEW = [("bare", "training", 1, True), ("lightning", "prepare_data", 0, False)]
PLACES = [("training", True), ("validation", False), ("reward", False), ("configure_model", False), ("setup", False)]
ALL = [
    (how, place, rank, stuck) for how in ("lightning", "torchrun", "bare") for place, stuck in PLACES for rank in (0, 1)
]


@pytest.mark.parametrize(
    ("launcher", "place", "rank", "stuck"), ALL if os.environ.get("FRPO_TEST_RANKS") == "all" else FEW
)
def test_all_ranks_end_with_the_one_that_fails(
    model_dir: Path, tmp_path: Path, launcher: str, place: str, rank: int, stuck: bool
) -> None:
    ended = rank_failures.run(model_dir, tmp_path, launcher, place, rank, "raise", stuck)
    assert all(ended.statuses), (ended.statuses, ended.output)
    assert not ended.killed, ended.output
    other = f"frpo: rank {1 - rank} ends: rank {rank} of 2 failed: "
    follows = f"Before this, rank {rank} of 2 failed: "
    assert other in ended.output or follows in ended.output
    assert f"planted on {rank} with api_key=***" in ended.output


def test_a_run_that_is_complete_ends_as_before(model_dir: Path, tmp_path: Path) -> None:
    ended = rank_failures.run(model_dir, tmp_path, "lightning", "nowhere", 0, "raise")
    assert ended.statuses == [0], ended.output
    assert "frpo: rank" not in ended.output
