from __future__ import annotations

import io
import sys

import torch
from lightning.pytorch import Trainer
from tracking_toy import ToyModule

from frpo.run.progress import Progress, shown


def fit(monkeypatch, terminal: bool, **settings) -> str:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[Progress()],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(ToyModule(batches=7))
    trainer.test(ToyModule(), verbose=False)
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    lines = fit(monkeypatch, terminal=False, log_every_n_steps=3, max_steps=50).splitlines()
    assert lines[0] == "training from step 0/50"
    assert lines[1].startswith("step 1/50 | reward 0.55 | kl 0.03 | loss 0.25 | ess 1.5 | rollout 0.5s | ")
    assert lines[1].endswith(" s/rollout")
    assert [line.split(" |")[0] for line in lines[2:]] == [
        "step 3/50", "step 6/50", "val at step 7", "test",
    ]  # fmt: skip
    assert lines[-2] == "val at step 7 | reward 0.55"


def test_the_pace_of_a_module_that_draws_no_completions_is_a_steps(monkeypatch):
    monkeypatch.delattr(ToyModule, "sampler")
    lines = fit(monkeypatch, terminal=False, log_every_n_steps=3, max_steps=50).splitlines()
    assert lines[1].endswith(" s/step")


def test_a_bar_on_a_terminal(monkeypatch):
    text = fit(monkeypatch, terminal=True)
    assert "Epoch 0: " in text
    assert "reward=12.6, kl=0.195, loss=0.25, ess=1.5, rollout_s=0.5" in text
    assert "step 1" not in text
    assert "v_num" not in text


def test_metrics_are_shown_in_one_order_and_absent_ones_left_out():
    metrics = {"train/seconds_update": 2.0, "train/loss": 1.0, "val/reward": 3.0, "train/reward": 4.0}
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    assert list(shown(tensors).items()) == [("reward", 4.0), ("loss", 1.0), ("update_s", 2.0)]
