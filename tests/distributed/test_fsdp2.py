"""Sharded weights (FSDP2): two processes with P prompts each train the policy that one trains with 2P."""

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
from frpo.modules.sam import SAM

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_equal_weights(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        assert (value - two["weights"][name]).abs().max() < 1e-6, name


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_equal_weights(one, two)
    assert len(one["rows"]) == len(two["rows"]) > 0
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("module", "steps"),
    [
        (partial(sharded_runs.full, sam=SAM(0.05)), 3),
        (partial(sharded_runs.lora, epochs_per_rollout=2), 4),
    ],
    ids=["full", "lora"],
)
def test_two_processes_equal_one(model_dir: Path, tmp_path: Path, module, steps: int) -> None:
    make = partial(module, model_dir)
    one, two = (run(make, sharded_runs.prompts, tmp_path / f"{n}.pt", n, max_steps=steps) for n in (1, 2))
    assert_equal(one, two)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4, abs=1e-5)
    assert {"val/reward/odd", "val/kl"} <= one["held_out"].keys()
    assert {"train/reward/odd", "train/kl", "train/lambda"} <= one["rows"][-1].keys()
    assert min(row["train/grad_norm"] for row in one["rows"]) > 0.05, "the gradient has to be clipped"


def test_two_processes_make_one_attack(model_dir: Path, tmp_path: Path) -> None:
    make = partial(sharded_runs.tamper, model_dir)
    one, two = (run(make, sharded_runs.attacks, tmp_path / f"{n}.pt", n, max_steps=2) for n in (1, 2))
    assert_equal_weights(one, two)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(model_dir: Path, tmp_path: Path) -> None:
    make = partial(sharded_runs.full, model_dir)
    one, two = (run(make, sharded_runs.prompts, tmp_path / f"{n}.pt", n, accelerator="gpu") for n in (1, 2))
    assert_equal(one, two)


@pytest.mark.parametrize("kind", ["lora", "supervised"])
def test_a_run_goes_on_with_another_number_of_processes(model_dir: Path, tmp_path: Path, kind: str) -> None:
    module, data = {
        "lora": (sharded_runs.lora, sharded_runs.prompts),
        "supervised": (sharded_runs.supervised, sharded_runs.demonstrations),
    }[kind]
    make = partial(module, model_dir)
    whole = run(make, data, tmp_path / "whole.pt", 1, max_steps=4)
    started = tmp_path / "whole/checkpoints/step=000002.ckpt"
    two = run(make, data, tmp_path / "two.pt", 2, max_steps=3, ckpt_path=started)
    stopped = tmp_path / "two/checkpoints/step=000003.ckpt"
    assert load_policy(stopped).step == 3
    for name, value in load_policy(stopped).model.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, two["weights"][f"policy_model.{name}"]), name
    again = run(make, data, tmp_path / "again.pt", 1, max_steps=4, ckpt_path=stopped)
    assert_equal({**whole, "rows": whole["rows"][2:]}, {**again, "rows": two["rows"] + again["rows"]})


def suites(batch_size: int) -> dict[str, Suite]:
    return {"drawn": evaluation_toys.drawn(batch_size=batch_size)}


def test_evaluation_of_sharded_weights(model_dir: Path, tmp_path: Path) -> None:
    make = partial(sharded_runs.supervised, model_dir)
    for n in (1, 2):
        run(make, sharded_runs.demonstrations, tmp_path / f"{n}.pt", n, max_steps=2, suites=suites)
    for step in (0, 2):
        one, two = (evaluation_toys.rows(tmp_path / str(n), step, "drawn") for n in (1, 2))
        assert one == two
        assert len(one) == 14
