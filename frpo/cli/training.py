"""``frpo fit``, ``frpo validate`` and ``frpo test``."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from frpo.cli.checkpoint import described
from frpo.cli.parsing import FrpoCLI
from frpo.foundation.durable import DiskError
from frpo.foundation.errors import ConfigError
from frpo.run.checkpoint import Checkpoint
from frpo.run.checkpoint_files import newest_first
from frpo.run.end_together import EndTogether


class _Started(Callback):
    """Whether a batch was reached: until then, what is refused is a matter of configuration."""

    def __init__(self) -> None:
        self.value = False

    def on_train_batch_start(self, *_: Any) -> None:
        """Training has begun."""
        self.value = True

    def on_validation_batch_start(self, *_: Any) -> None:
        """Validation has begun."""
        self.value = True

    def on_test_batch_start(self, *_: Any) -> None:
        """Testing has begun."""
        self.value = True


class _Replace(Callback):
    """Removes the checkpoints of the run that this one replaces, once nothing stands in its way any more."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    @rank_zero_only
    def on_train_start(self, *_: Any) -> None:
        """Everything was checked and loaded."""
        for file in self.files:
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)


def fit(args: list[str]) -> int:
    """Train: ``frpo fit --config RECIPE [--key value ...]``."""
    cli = FrpoCLI("fit", args)
    checkpoint = cli.checkpoint()
    cli.trainer.callbacks.append(_Replace(cli.earlier_checkpoints()))  # type: ignore[attr-defined]
    cli.record_config()
    try:
        with refusals(cli.trainer):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning's own exit status for SIGTERM is 0, as if the run were complete
        return _stopped(cli.trainer, stop)
    return 0


def _stopped(trainer: Any, stop: SystemExit) -> int:
    """Say how to go on after a signal; return the exit status that a shell gives to it."""
    callback = trainer.checkpoint_callback
    if isinstance(stop, SIGTERMException):
        by = (callback.stopped_by if isinstance(callback, Checkpoint) else None) or signal.SIGTERM
    elif isinstance(stop.__context__, KeyboardInterrupt):
        by = signal.SIGINT
    else:
        raise stop
    if not trainer.is_global_zero:
        # Lightning's launcher kills the other processes as soon as one of its own ends with another status.
        return 0
    saved = [] if callback is None or callback.dirpath is None else newest_first(callback.dirpath)
    advice = "no checkpoint was written yet; start again without --ckpt_path"
    if saved:
        advice = f"go on from {described(saved[:1])} with --ckpt_path last"
    print(f"frpo fit: stopped by {by.name} after step {trainer.global_step}; {advice}", file=sys.stderr)
    return 128 + by


def validate(args: list[str]) -> int:
    """Evaluate on the validation prompts: ``frpo validate --config CONFIG --ckpt_path last``."""
    evaluate("validate", args)
    return 0


def test(args: list[str]) -> int:
    """Evaluate on the test prompts: ``frpo test --config CONFIG --ckpt_path last``."""
    evaluate("test", args)
    return 0


def evaluate(command: str, args: list[str], verbose: bool = True) -> Mapping[str, float]:
    """Run ``validate`` or ``test`` on a command line and return the metrics by name; ``verbose`` prints them."""
    cli = FrpoCLI(command, args)
    checkpoint = cli.checkpoint()
    run = cli.trainer.validate if command == "validate" else cli.trainer.test
    with refusals(cli.trainer):
        results = run(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=verbose)
    return {name: value for result in results for name, value in result.items()}


@contextmanager
def refusals(trainer: Any) -> Iterator[None]:
    """Turn what is refused before the first batch into a :class:`ConfigError`; later errors keep their traceback.

    A disk that is full or cannot be written says all there is to say at any time.
    """
    started = _Started()
    trainer.callbacks.append(started)
    for callback in trainer.callbacks:
        if isinstance(callback, EndTogether):
            callback.start(trainer)
    try:
        yield
    except DiskError as error:
        raise ConfigError(error.strerror or str(error)) from error
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        if started.value:
            raise
        raise ConfigError(str(error)) from error
