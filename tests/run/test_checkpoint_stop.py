"""SIGTERM and Ctrl-C under a Trainer: what is saved, what is raised, and that the signals are given back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tracking_toy import ToyModule

from frpo.run.checkpoint import Checkpoint, latest

pytestmark = pytest.mark.filterwarnings("ignore")


class Send(Callback):
    """Sends signals in one hook at one step."""

    def __init__(self, hook: str, step: int, *signals: signal.Signals) -> None:
        self.step, self.signals = step, signals
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            for number in self.signals:
                os.kill(os.getpid(), number)


class Validations(Callback):
    def __init__(self) -> None:
        self.ended: list[int] = []

    def on_validation_end(self, trainer, *_):
        self.ended.append(trainer.global_step)


def fit(folder: Path, *callbacks: Callback, resume: bool = False, every: int = 2) -> ToyModule:
    module = ToyModule(batches=3)
    Trainer(
        max_epochs=2,
        callbacks=[*callbacks, Checkpoint(str(folder), 100)],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
    ).fit(module, ckpt_path=latest(folder) if resume else None)
    return module


@pytest.mark.parametrize(
    ("hook", "step", "saved", "validated"),
    [
        ("on_train_batch_start", 0, 1, []),
        ("on_train_batch_start", 1, 2, []),  # the validation of step 2 is left
        ("on_validation_batch_end", 2, 2, []),
        ("on_train_batch_start", 2, 3, [2]),  # the end of an epoch
        ("on_validation_end", 4, 4, [2, 4]),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_in_hand_is_saved_and_nothing_is_repeated_or_left_out(tmp_path, number, hook, step, saved, validated):
    before, first, second = Validations(), Validations(), Validations()
    whole = fit(tmp_path / "whole", before)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, first, Send(hook, step, number))
    assert torch.load(latest(tmp_path), weights_only=True)["global_step"] == saved
    assert first.ended == validated
    module = fit(tmp_path, second, resume=True)
    assert first.ended + second.ended == before.ended == [2, 4, 6]
    assert module.seen == whole.seen[2 * saved :]
    assert torch.equal(module.layer_weight, whole.layer_weight)


def test_a_validation_after_an_epochs_last_batch_is_left_to_the_resumed_run(tmp_path):
    before, after = Validations(), Validations()
    whole = fit(tmp_path / "whole", before, every=3)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, after, Send("on_validation_batch_end", 3, signal.SIGTERM), every=3)
    assert torch.load(latest(tmp_path), weights_only=True)["global_step"] == 3
    module = fit(tmp_path, after, resume=True, every=3)
    assert after.ended == before.ended == [3, 6]
    assert module.seen == whole.seen[6:]
    assert torch.equal(module.layer_weight, whole.layer_weight)


def test_a_validation_after_a_stopped_fit_runs(tmp_path):
    ended, module = Validations(), ToyModule(batches=3)
    common = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [Send("on_train_batch_start", 0, signal.SIGTERM), Checkpoint(str(tmp_path), 100), ended]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, num_sanity_val_steps=0, default_root_dir=tmp_path, **common)
    with pytest.raises(SIGTERMException):
        trainer.fit(module)
    trainer.validate(module, verbose=False)
    assert len(ended.ended) == 1


def test_a_handler_of_the_callers_is_not_run_in_the_middle_of_a_step_and_is_back_afterwards(tmp_path):
    called: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Send("on_train_batch_start", 2, signal.SIGTERM, signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert called == []


def test_ctrl_c_after_any_first_signal_stops_at_once_and_saves_no_half_step(tmp_path):
    previous = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, Send("on_before_backward", 2, signal.SIGTERM, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert latest(tmp_path) is None


def test_the_last_batch_is_not_stopped_after(tmp_path):
    ended = Validations()
    fit(tmp_path, ended, Send("on_train_batch_start", 5, signal.SIGTERM))
    assert ended.ended == [2, 4, 6]
    assert torch.load(latest(tmp_path), weights_only=True)["global_step"] == 6
