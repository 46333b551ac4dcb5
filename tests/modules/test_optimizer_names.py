"""The state of an optimiser by the names of its weights, whatever groups it makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import supervised_runs
import torch

from frpo.run.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


class ByShape(torch.optim.AdamW):
    """Decays matrices alone: its groups are not in the order of the module."""

    def __init__(self, parameters: Any) -> None:
        given = list(parameters)
        vectors, matrices = ([p for p in given if (p.dim() > 1) is wide] for wide in (False, True))
        super().__init__([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], lr=1e-2)


def fit(model_dir: Path, folder: Path, steps: int, ckpt_path: Path | None = None) -> Any:
    module = supervised_runs.module(model_dir, optimizer=ByShape)
    callbacks = [Checkpoint(str(folder), 2)]
    options = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True, "callbacks": callbacks}
    trainer = runs.trainer(folder, **options)
    trainer.fit(module, datamodule=supervised_runs.data(), ckpt_path=ckpt_path)
    return module


def test_each_weight_has_its_own_state_and_takes_it_along(model_dir: Path, tmp_path: Path) -> None:
    fit(model_dir, tmp_path / "first", 2)
    saved = tmp_path / "first/checkpoints/step=000002.ckpt"
    checkpoint = torch.load(saved, weights_only=True)
    state, shapes = checkpoint["optimizer_states"][0]["state"], checkpoint["frpo"]["shapes"]
    assert state.keys() == shapes.keys()
    assert all(list(one["exp_avg"].shape) == list(shapes[name]) for name, one in state.items())
    whole, resumed = fit(model_dir, tmp_path / "whole", 4), fit(model_dir, tmp_path / "first", 4, saved)
    for name, value in runs.weights(whole).items():
        assert torch.equal(value, runs.weights(resumed)[name]), name
