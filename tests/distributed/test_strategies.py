"""DDP, FSDP1 and FSDP2: two processes with P prompts each train the policy that one trains with 2P."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import evaluation_toys
import pytest
import sharded_runs
import torch
from sharded_runs import run

from frpo.evaluation.suite import Suite
from frpo.models.checkpoint import load_policy
from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled
from frpo.modules.sam import SAM

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("ddp", "fsdp1", "fsdp2")


def assert_equal_weights(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().max() < 1e-6, name


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_equal_weights(one["weights"], two["weights"])
    assert len(one["rows"]) == len(two["rows"]) > 0
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def full(model_dir: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Every weight, with SAM and two optimiser steps a rollout; and the run in one process."""
    make = partial(sharded_runs.full, model_dir, sam=SAM(0.05))
    return make, run(make, sharded_runs.prompts, folder / "full.pt", max_steps=4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(full, tmp_path: Path, kind: str) -> None:
    make, one = full
    assert_equal(one, run(make, sharded_runs.prompts, tmp_path / "two.pt", kind, max_steps=4))
    assert {"val/reward/odd", "val/kl"} <= one["held_out"].keys()
    assert {"train/reward/odd", "train/kl", "train/lambda"} <= one["rows"][-1].keys()
    assert min(row["train/grad_norm"] for row in one["rows"]) > 0.05, "the gradient has to be clipped"


def suites(batch_size: int) -> dict[str, Suite]:
    return {"drawn": evaluation_toys.drawn(batch_size=batch_size)}


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that ``frpo export`` would write."""
    return {name: p.detach() for name, p in load_policy(checkpoint).model.named_parameters() if p.requires_grad}


def test_a_run_goes_on_under_any_strategy(model_dir: Path, tmp_path: Path) -> None:
    """With an adapter: 2 steps in one process, 2 each in two under FSDP1, FSDP2 and DDP, 2 in one."""
    make = partial(run, partial(sharded_runs.lora, model_dir), sharded_runs.prompts, suites=suites)
    whole = make(tmp_path / "whole.pt", max_steps=10)
    rows, at = [], tmp_path / "whole/checkpoints/step=000002.ckpt"
    for step, kind in ((4, "fsdp1"), (6, "fsdp2"), (8, "ddp"), (10, None)):
        part = make(tmp_path / f"{step}.pt", kind, max_steps=step, ckpt_path=at)
        rows += part["rows"]
        at = tmp_path / f"{step}/checkpoints/step={step:06d}.ckpt"
        assert_equal_weights(trained(tmp_path / f"whole/checkpoints/step={step:06d}.ckpt"), trained(at))
        one, two = (evaluation_toys.rows(tmp_path / name, step, "drawn") for name in ("whole", str(step)))
        assert one == two
        assert len(one) == 14
    assert_equal({**whole, "rows": whole["rows"][1:]}, {**part, "rows": rows})


@pytest.fixture(scope="module")
def attacked(model_dir: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """An attack on an adapter, whose reference is the adapter switched off; and the run in one process."""
    policy = Policy(str(model_dir), adapter=LoRA(r=3, alpha=6), dtype="float64", gradient_checkpointing=True)
    make = partial(sharded_runs.tamper, model_dir, policy=policy, reference=AdapterDisabled())
    return make, run(make, sharded_runs.attacks, folder / "tamper.pt", max_steps=2)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_two_processes_make_one_attack(attacked, tmp_path: Path, kind: str) -> None:
    make, one = attacked
    two = run(make, sharded_runs.attacks, tmp_path / "two.pt", kind, max_steps=2)
    assert_equal_weights(one["weights"], two["weights"])
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4)
