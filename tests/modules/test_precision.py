"""Weights in half precision (``bf16-true``): the batches pass as they are, and all but the model stays wide."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import supervised_runs
import torch
from evaluation_toys import evaluation, rows

from frpo.models.policy import Policy
from frpo.models.reference import FrozenCopy
from frpo.modules.precision import float32_by_default

pytestmark = pytest.mark.filterwarnings("ignore")


class Types(runs.L.Callback):
    """Types of what a step makes: losses, and new tensors in the backward pass of one."""

    def __init__(self) -> None:
        self.losses: set[torch.dtype] = set()
        self.default: set[torch.dtype] = set()

    def on_before_backward(self, trainer, module, loss) -> None:
        self.losses.add(loss.dtype)
        self.default.add(torch.get_default_dtype())


def policy(model_dir: Path) -> Policy:
    return Policy(str(model_dir), dtype="float32")


def build(model_dir: Path, kind: str):
    if kind == "policy":
        return runs.module(model_dir, policy=policy(model_dir), reference=FrozenCopy()), runs.data(val=4)
    return supervised_runs.module(model_dir, dtype="float32"), supervised_runs.data(val=4)


@pytest.mark.parametrize("kind", ["policy", "supervised"])
def test_bf16_true_keeps_what_is_not_a_weight_wide(model_dir: Path, tmp_path: Path, kind: str) -> None:
    model, data = build(model_dir, kind)
    types = Types()
    trainer = runs.trainer(
        tmp_path,
        precision="bf16-true",
        callbacks=[types, evaluation(tmp_path)],
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 3
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert types.default == {torch.float32}
    assert types.losses <= {torch.float32, torch.float64}
    buffers = dict(model.policy_model.named_buffers())
    fresh = dict(Policy(str(model_dir), dtype="float32").load_base().named_buffers())
    (rotary,) = [name for name in buffers if name.endswith("rotary_emb.inv_freq")]
    assert torch.equal(buffers[rotary], fresh[rotary]), "positions would be other ones than in the exported policy"
    assert model.train_averages.total.dtype == model.eval_averages.total.dtype == torch.float32
    assert trainer.callback_metrics["train/lr"] == pytest.approx(1e-2, rel=1e-6), "rounded to bfloat16 on the way"
    assert torch.get_default_dtype() == torch.float32
    assert len(rows(tmp_path, 3)) == 7


def test_new_tensors_are_float32_within_alone() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with float32_by_default():
            assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_every_weight_in_bfloat16_is_warned_of(model_dir: Path, tmp_path: Path) -> None:
    model, data = build(model_dir, "supervised")
    with pytest.warns(UserWarning, match="bf16-true.*small updates are rounded away.*bf16-mixed"):
        runs.trainer(tmp_path, precision="bf16-true", max_steps=1).fit(model, datamodule=data)
