"""What only a CUDA device can show: ``pytest -m gpu`` trains the tiny policy on one, or on two where there are."""

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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def suites(batch_size: int) -> dict[str, Suite]:
    return {"drawn": evaluation_toys.drawn(batch_size=batch_size)}


@pytest.mark.parametrize("module", [sharded_runs.full, sharded_runs.lora], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [None, "ddp", "fsdp1", "fsdp2"])
def test_one_gpu_trains_generates_and_evaluates_in_mixed_precision(
    model_dir: Path, tmp_path: Path, module: Any, kind: str | None
) -> None:
    """The self-check before the first step holds sampler and trainer to one policy, reference and policy too."""
    adapter = LoRA(r=3, alpha=6) if module is sharded_runs.lora else None
    make = partial(module, model_dir, policy=Policy(str(model_dir), adapter=adapter))
    found = run(
        make,
        sharded_runs.prompts,
        tmp_path / "run.pt",
        kind,
        processes=1,
        accelerator="gpu",
        precision="bf16-mixed",
        suites=suites,
    )
    assert all(torch.isfinite(value).all() for value in found["weights"].values())
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}
    assert found["rows"][-1]["train/grad_norm"] > 0
    assert len(evaluation_toys.rows(tmp_path / "run", 2, "drawn")) == 14
    saved = load_policy(tmp_path / "run/checkpoints/step=000002.ckpt").model
    for name, value in saved.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, found["weights"][f"policy_model.{name}"]), name


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=TWO)])
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_gpus_train_what_one_cpu_trains(model_dir: Path, tmp_path: Path, kind: str, processes: int) -> None:
    make = partial(sharded_runs.full, model_dir)
    cpu = run(make, sharded_runs.prompts, tmp_path / "cpu.pt")
    gpu = run(make, sharded_runs.prompts, tmp_path / "gpu.pt", kind, processes, accelerator="gpu")
    for name, value in cpu["weights"].items():
        assert (value - gpu["weights"][name]).abs().max() < 1e-6, name
