"""A run of two ranks by the command line in which one rank fails, and how the others end.

As a script: ``python tests/rank_failures.py LAUNCHER PLACE RANK KIND`` prints what a user would see.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import runs
import yaml
from lightning.pytorch import Callback

from frpo.models.policy import LoRA, Policy
from frpo.types import Completion, Judgement

Kind = Literal["raise", "kill", "none"]
HELPERS = Path(__file__).parent
LIMIT_S = 300


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def fail(kind: Kind) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(f"planted on {rank()} with api_key=hf_abcdefghijklmnopqrstuvwx")


class Fails(Callback):
    """One rank fails in a hook; with ``stuck`` the others then sit still, as in a collective that never ends."""

    def __init__(self, place: str, rank: int, kind: Kind, stuck: bool = False) -> None:
        self.place, self.rank, self.kind, self.stuck = place, rank, kind, stuck

    def _at(self, place: str) -> None:
        if place != self.place:
            return
        if rank() == self.rank:
            fail(self.kind)
        if self.stuck:
            time.sleep(2 * LIMIT_S)

    def setup(self, *_: Any, **__: Any) -> None:
        self._at("setup")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._at("training")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._at("validation")

    def on_exception(self, *_: Any) -> None:
        if self.place == "teardown" or self.kind == "none":
            time.sleep(2 * LIMIT_S)


class FailingPolicy(Policy):
    """Its weights cannot be loaded on one rank."""

    def __init__(self, path: str, rank: int, kind: Kind) -> None:
        super().__init__(path, adapter=LoRA(r=4, alpha=8))
        self.rank, self.kind = rank, kind

    def load(self) -> Any:
        if rank() == self.rank:
            fail(self.kind)
        return super().load()


class FailingReward(runs.Graded):
    """Fails on one rank at its second call."""

    def __init__(self, rank: int, kind: Kind) -> None:
        super().__init__()
        self.rank, self.kind, self.calls = rank, kind, 0

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        self.calls += 1
        if self.calls == 2 and rank() == self.rank:
            fail(self.kind)
        return super().__call__(completions)


class FailingWords(runs.Words):
    """Cannot be fetched."""

    def prepare(self) -> None:
        if rank() == 0:
            fail("raise")


def configuration(model_dir: Path, place: str, rank: int, kind: Kind, stuck: bool) -> dict[str, Any]:
    failing = {"rank": rank, "kind": kind}
    policy: dict[str, Any] = {
        "class_path": "frpo.models.policy.Policy",
        "init_args": {
            "path": str(model_dir),
            "adapter": {"class_path": "frpo.models.policy.LoRA", "init_args": {"r": 4, "alpha": 8}},
        },
    }
    if place == "configure_model":
        policy = {"class_path": "rank_failures.FailingPolicy", "init_args": {"path": str(model_dir), **failing}}
    reward: dict[str, Any] = {"class_path": "runs.Graded"}
    if place == "reward":
        reward = {"class_path": "rank_failures.FailingReward", "init_args": failing}
    words = "rank_failures.FailingWords" if place == "prepare_data" else "runs.Words"
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_steps": 3,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "rank_failures.Fails", "init_args": {"place": place, "stuck": stuck, **failing}}
            ],
        },
        "model": {
            "class_path": "frpo.modules.policy_optimization.PolicyOptimization",
            "init_args": {
                "policy": policy,
                "objective": {"class_path": "frpo.objectives.GRPO"},
                "reward": reward,
                "reference": {"class_path": "frpo.models.reference.AdapterDisabled"},
                "sampler": {
                    "class_path": "frpo.rollouts.in_process.InProcessSampler",
                    "init_args": {"max_new_tokens": 6},
                },
                "group_size": 4,
            },
        },
        "data": {
            "class_path": "frpo.data.prompts.module.PromptDataModule",
            "init_args": {
                "train": {"class_path": words},
                "val": {"class_path": "runs.Words", "init_args": {"n": 6}},
                "batch_size": 4,
                "max_prompt_length": 16,
            },
        },
    }


@dataclass
class Ended:
    """Exit statuses, how many processes had to be killed as they did not end by themselves, and all they printed."""

    statuses: list[int]
    killed: int
    output: str


def commands(launcher: str, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Each process to start: its words and what it adds to the environment."""
    fit = ["-m", "frpo", "fit", "--config", str(folder / "run.yaml"), "--output_dir", str(folder / "out")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if launcher == "lightning":
        return [(fit, {})]
    if launcher == "torchrun":
        return [(["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, *fit], {})]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [(fit, {**address, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]


def run(model_dir: Path, folder: Path, launcher: str, place: str, rank: int, kind: Kind, stuck: bool = False) -> Ended:
    """Run it in ``folder``; processes left after ``LIMIT_S`` are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(model_dir, place, rank, kind, stuck)))
    mark = f"RANK_FAILURES={folder}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HELPERS.parents[1]}:{HELPERS}"}
    environment |= {"RANK_FAILURES": str(folder)}
    until = time.monotonic() + LIMIT_S
    with (folder / "log.txt").open("w") as log:
        processes = [
            subprocess.Popen([sys.executable, *words], env=environment | more, cwd=folder, stdout=log, stderr=log)
            for words, more in commands(launcher, folder)
        ]
        while time.monotonic() < until and (any(p.poll() is None for p in processes) or _alive(mark)):
            time.sleep(0.1)
    left = _alive(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return Ended([p.wait() for p in processes], len(left), (folder / "log.txt").read_text(errors="replace"))


def _alive(mark: str) -> list[int]:
    """Processes of a run, those that were started by others of it included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


if __name__ == "__main__":
    where = Path(tempfile.mkdtemp())
    launcher_, place_, rank_, kind_ = sys.argv[1:5]
    seen = run(Path(os.environ["MODEL_DIR"]), where, launcher_, place_, int(rank_), kind_, *map(bool, sys.argv[5:]))
    print(seen.output[-int(os.environ.get("TAIL", "3000")) :])
    print(launcher_, place_, rank_, kind_, *sys.argv[5:], "->", seen.statuses, f"{seen.killed} killed", where)
