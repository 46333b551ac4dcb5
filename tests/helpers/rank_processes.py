"""A function on several ranks: new processes of one gloo group, what each returned, printed and exited with."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import torch
import torch.distributed


@dataclass
class Rank:
    """``value`` is None and ``status`` is not 0 where the function did not return."""

    status: int | None
    value: Any
    printed: str


def _child(rank: int, processes: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    value = function(rank, *args)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(value))


def run(folder: Path, function: Callable[..., Any], *args: Any, processes: int = 2) -> list[Rank]:
    """Run ``function(rank, *args)``; a process that is left after ``forks.HANGS_S`` has the status None."""
    context = forks.context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = (processes, port, folder, function, args)
    started = [context.Process(target=_child, args=(rank, *common)) for rank in range(processes)]
    for process in started:
        process.start()
    until = time.monotonic() + forks.HANGS_S
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    statuses = [process.exitcode for process in started]
    for process in started:
        process.kill()
    ranks = []
    for rank in range(processes):
        file = folder / f"{rank}.pickle"
        value = pickle.loads(file.read_bytes()) if file.is_file() else None
        printed = (folder / f"{rank}.log").read_text()
        ranks.append(Rank(statuses[rank], value, printed))
    return ranks
