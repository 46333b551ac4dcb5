"""Suites on the random policy, shared by the tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import runs

from frpo.evaluation.callback import Evaluation
from frpo.evaluation.suite import Suite
from frpo.rollouts.in_process import InProcessSampler


def suite(**changes: Any) -> Suite:
    """Seven prompts of one to four words, a graded score, greedy completions of at most 5 tokens."""
    arguments: dict[str, Any] = {
        "prompts": runs.Words(7),
        "scores": {"graded": runs.Graded()},
        "sampler": InProcessSampler(max_new_tokens=5, temperature=0.0),
        "batch_size": 3,
        "max_prompt_length": 16,
    }
    return Suite(**{**arguments, **changes})


def drawn(**changes: Any) -> Suite:
    """The same with two completions a prompt, drawn at temperature 1."""
    return suite(**{"samples": 2, "sampler": InProcessSampler(max_new_tokens=5), **changes})


def evaluation(output_dir: Path, *suites: Suite, **changes: Any) -> Evaluation:
    """The callback with suites ``s0``, ``s1``, ..."""
    named = {f"s{i}": one for i, one in enumerate(suites or (suite(),))}
    return Evaluation(str(output_dir), named, **changes)


def rows(output_dir: Path, step: int, name: str = "s0") -> list[dict[str, Any]]:
    """The rows of one file, read plainly."""
    text = (output_dir / "evaluation" / name / f"step={step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def steps(output_dir: Path, name: str = "s0") -> list[int]:
    """The steps that have a file."""
    return sorted(int(path.stem.removeprefix("step=")) for path in (output_dir / "evaluation" / name).iterdir())
