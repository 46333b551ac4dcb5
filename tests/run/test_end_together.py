"""What a rank says when it fails, and how the others end."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_processes
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from frpo.run import end_together
from frpo.run.end_together import EndTogether

STUCK_S = 600
"""Longer than :func:`rank_processes.run` waits: who sits still so long has the status None."""


class Loggers(list):
    """One logger that says how it was closed."""

    def __init__(self) -> None:
        super().__init__([SimpleNamespace(finalize=lambda status: os.write(2, f"closed as {status}\n".encode()))])


def watched(patience_s: float = 60.0) -> tuple[EndTogether, SimpleNamespace]:
    end_together.POLL_S, end_together.GRACE_S, end_together.TEARDOWN_S = 0.1, 0.5, 1.0
    callback, trainer = EndTogether(), SimpleNamespace(world_size=2, loggers=Loggers())
    callback.patience_s = patience_s
    callback.setup(trainer, None, "fit")
    return callback, trainer


def fails(rank: int, failing: int, stuck_too: bool) -> None:
    callback, trainer = watched()
    time.sleep(0.5)
    if rank != failing:
        time.sleep(STUCK_S)  # as in a collective that never ends
    try:
        raise ValueError("no reward at https://ann:secret@host/v1")
    except ValueError as error:
        callback.on_exception(trainer, None, error)
        if stuck_too:
            time.sleep(STUCK_S)
        raise


@pytest.mark.parametrize(("failing", "stuck_too"), [(0, False), (1, False), (0, True)])
def test_a_rank_that_waits_ends_with_the_one_that_failed(tmp_path: Path, failing: int, stuck_too: bool) -> None:
    ranks = rank_processes.run(tmp_path, fails, failing, stuck_too)
    failed, waited = ranks[failing], ranks[1 - failing]
    assert (failed.status, waited.status) == (1, 1), waited.printed
    said = f"frpo: rank {1 - failing} ends: rank {failing} of 2 failed: ValueError: no reward at https://***@host/v1"
    assert said in waited.printed
    assert "secret" not in waited.printed
    assert "closed as failed" in waited.printed
    assert "ValueError: no reward at" in failed.printed, "its own traceback"
    assert "closed as failed" not in failed.printed, "its trainer does that"


def dies(rank: int, dying: int) -> None:
    watched(patience_s=2.0)
    time.sleep(1)
    if rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(STUCK_S)


@pytest.mark.parametrize(
    ("dying", "said"),
    [(1, "rank 1 of 2 gave no sign of life for 2 s: it was killed or is stuck"), (0, "rank 0 of 2 is gone")],
)
def test_a_rank_that_was_killed_is_missed(tmp_path: Path, dying: int, said: str) -> None:
    ranks = rank_processes.run(tmp_path, dies, dying)
    assert ranks[dying].status == -signal.SIGKILL
    assert ranks[1 - dying].status == 1
    assert f"frpo: rank {1 - dying} ends: {said}" in ranks[1 - dying].printed


def follows(rank: int) -> list[str]:
    callback, trainer = watched()
    time.sleep(0.5)
    error = RuntimeError(f"on {rank}")
    if rank == 1:
        dist.barrier()  # after the first has failed
    callback.on_exception(trainer, None, error)
    if rank == 0:
        dist.barrier()
    dist.barrier()  # rank 0 holds the store, and stays until it was read
    return getattr(error, "__notes__", [])


def test_what_follows_from_a_failure_names_it(tmp_path: Path) -> None:
    zero, one = rank_processes.run(tmp_path, follows)
    assert (zero.value, one.value) == ([], ["Before this, rank 0 of 2 failed: RuntimeError: on 0"])


def raises_and_is_gone(rank: int) -> str:
    """Both raise, and the second is gone before its thread looks again."""
    end_together.POLL_S, end_together.READ_S = 5.0, STUCK_S
    callback = EndTogether()
    callback.setup(SimpleNamespace(world_size=2, loggers=Loggers()), None, "fit")
    dist.barrier()
    time.sleep(0.5 * rank)
    callback.on_exception(None, None, RuntimeError(f"on {rank}"))
    if rank == 1:
        os._exit(3)
    return "returned"


def test_where_all_raise_none_waits_for_one_that_is_gone(tmp_path: Path) -> None:
    zero, one = rank_processes.run(tmp_path, raises_and_is_gone)
    assert (zero.value, one.status) == ("returned", 3)


def ends_well(rank: int, how: str) -> str:
    callback, trainer = watched(patience_s=1.0)
    time.sleep(0.5)
    if rank == 1:
        time.sleep(3)  # longer than the patience: the other is done, not dead
    if how == "complete":
        callback.teardown(trainer, None, "fit")
    else:
        callback.on_exception(trainer, None, SIGTERMException())
    if rank == 0 and how == "complete":
        time.sleep(3)
    return "returned"


def test_ranks_that_are_complete_at_different_times_end_well(tmp_path: Path) -> None:
    ranks = rank_processes.run(tmp_path, ends_well, "complete")
    assert [(rank.status, rank.value) for rank in ranks] == [(0, "returned")] * 2, ranks


def terminated(rank: int) -> str:
    callback, trainer = watched()
    time.sleep(0.5)
    callback.on_exception(trainer, None, SIGTERMException())
    time.sleep(rank)
    return "returned"


def test_sigterm_is_not_a_failure(tmp_path: Path) -> None:
    ranks = rank_processes.run(tmp_path, terminated)
    assert [(rank.status, rank.value) for rank in ranks] == [(0, "returned")] * 2, ranks


def test_one_process_is_not_watched() -> None:
    callback, trainer = EndTogether(), SimpleNamespace(world_size=1)
    callback.setup(trainer, None, "fit")
    assert "end-together" not in {thread.name for thread in threading.enumerate()}
    callback.on_exception(trainer, None, ValueError("one"))
    callback.teardown(trainer, None, "fit")


def test_a_callback_that_watches_can_be_copied_to_new_processes() -> None:
    callback = EndTogether(patience_s=30)
    callback.start(SimpleNamespace(loggers=[]))
    assert pickle.loads(pickle.dumps(callback)).patience_s == 30
    callback.teardown(None, None, "fit")


def test_a_patience_shorter_than_the_signs_of_life_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EndTogether.patience_s: got 1, expected more than 5"):
        EndTogether(patience_s=1)
