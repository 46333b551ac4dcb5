"""Kill ``frpo fit`` at random moments, resume it, and compare all it leaves with an uninterrupted run.

Run as a script: ``python fault_runs.py FOLDER KILLS COMMANDS``. Everything is imported once and a run is a fork, so
that each kill is real and costs seconds; the first ``COMMANDS`` runs are a ``python -m frpo fit`` in its own process.
Prints JSON: a row for each kill.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from frpo.run.checkpoint import latest
from frpo.run.completions import read_completions

HERE = Path(__file__).parent
STEPS = 9
LIMIT_SECONDS = 120
MOST_KILLS = 3
CONFIGURATION: dict[str, Any] = {
    "include": [str(HERE.parents[1] / "recipes" / "tiny" / "frpo.yaml")],
    "name": "run",
    "output_dir": "out",
    "trainer": {
        "max_steps": STEPS,
        "val_check_interval": 2,
        "callbacks": [
            {"class_path": "frpo.run.run_record.RunRecord", "init_args": {"output_dir": "${output_dir}"}},
            {
                "class_path": "frpo.run.completion_table.CompletionTable",
                "init_args": {"output_dir": "${output_dir}", "upload_every_n_steps": 3},
            },
            {"class_path": "frpo.run.progress.Progress"},
            {"class_path": "fault_plugs.Plug"},
            {
                "class_path": "frpo.run.checkpoint.Checkpoint",
                "init_args": {"output_dir": "${output_dir}", "every_n_train_steps": 3},
            },
        ],
    },
    "model": {
        "init_args": {
            "policy": {"class_path": "frpo.tiny.policy.TinyPolicy", "init_args": {"steps": 2}},
            "sampler": {"init_args": {"max_new_tokens": 6}},
            "group_size": 4,
            "kl": {
                "init_args": {
                    "beta": {
                        "class_path": "frpo.schedules.AdaptiveKL",
                        "init_args": {"initial": 0.05, "target": 0.01},
                    }
                }
            },
        }
    },
    # Epochs of three batches, validations of two.
    "data": {
        "init_args": {
            "batch_size": 4,
            "val_batch_size": 2,
            "train": {"init_args": {"limit": 12}},
            "val": {"init_args": {"limit": 4}},
        }
    },
}


def configure(folder: Path, **trainer: Any) -> None:
    """Write the configuration into ``folder``; policy and database tables are made once, beside the folders."""
    folder.mkdir()
    tree = json.loads(json.dumps(CONFIGURATION))
    tree["trainer"].update(trainer)
    tree["model"]["init_args"]["policy"]["init_args"]["cache_dir"] = str(folder.parent / "tiny")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    tables = folder.parent / "mlflow.db"
    if tables.is_file():
        shutil.copy(tables, folder / "mlflow.db")


def words(folder: Path) -> list[str]:
    """The command line a user would write: with a checkpoint go on from it, without one begin."""
    resume = ["--ckpt_path", "last"] if list(folder.glob("out/checkpoints/*.ckpt")) else []
    return ["fit", "--config", "run.yaml", *resume]


def environment(plan: dict[str, Any] | None) -> dict[str, str]:
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    kill = {} if plan is None else {"FRPO_TEST_KILL": json.dumps(plan)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **kill}


def forked(folder: Path, plan: dict[str, Any] | None) -> int:
    from frpo.__main__ import main

    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ.update(environment(plan))
            os.chdir(folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["frpo", *words(folder)]
            status = main(words(folder))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return child


def command(folder: Path, plan: dict[str, Any] | None) -> int:
    with (folder / "log.txt").open("a") as log:
        line = [sys.executable, "-m", "frpo", *words(folder)]
        return subprocess.Popen(line, cwd=folder, env=environment(plan), stdout=log, stderr=log).pid


def run(start: Callable[..., int], folder: Path, plan: dict[str, Any] | None = None, seconds: float = 0.0) -> int:
    """Run to the end or to its death; ``seconds`` after its first output it is killed where that is above 0.

    Returns the exit status, negative for a signal.
    """
    child = start(folder, plan)
    limit = time.monotonic() + LIMIT_SECONDS
    kill_at = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if seconds and kill_at is None and (folder / "out" / "environment.json").is_file():
            kill_at = now + seconds
        if now > limit or (kill_at is not None and now > kill_at):
            os.kill(child, signal.SIGKILL)
            kill_at = None
            seconds = 0.0
            assert now <= limit, f"the run in {folder} hung"
        time.sleep(0.002)


def exact(value: Any) -> Any:
    """A checkpoint as something that ``==`` compares bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list | tuple) else value


def state(folder: Path) -> dict[str, Any]:
    """Weights, optimiser, schedules, steps and place in the prompts of the last checkpoint."""
    checkpoint = torch.load(folder / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    place = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    kept = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "global_step", "epoch")}
    return exact({**kept, "schedules": checkpoint["frpo"]["schedules"], "place": place})


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(read_completions(folder / "out"))


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v and "seconds" not in k} for row in csv.DictReader(file)]


def mlflow_runs(folder: Path) -> dict[str, str]:
    """Status by run, oldest first."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        return dict(database.execute("select run_uuid, status from runs order by start_time"))


def histories(folder: Path) -> list[tuple[str, int, float | None]]:
    """Metric, step and value in the run of the last checkpoint, in order; the value of a time is left out."""
    checkpoint = torch.load(folder / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    run_id = checkpoint["callbacks"]["RunRecord"]["run_id"]
    query = "select key, step, value from metrics where run_uuid = ? order by key, step, timestamp"
    with sqlite3.connect(folder / "mlflow.db") as database:
        found = database.execute(query, (run_id,)).fetchall()
    return [(key, step, None if "seconds" in key else value) for key, step, value in found]


def lost_and_doubled(found: list[Any], expected: list[Any]) -> tuple[int, int]:
    """How many of ``expected`` are missing, and how many of ``found`` are too many."""
    left = [json.dumps(item, sort_keys=True) for item in expected]
    more = 0
    for item in found:
        text = json.dumps(item, sort_keys=True)
        if text in left:
            left.remove(text)
        else:
            more += 1
    return len(left), more


def compared(folder: Path, whole: Path) -> dict[str, Any]:
    found = {"rows": rows, "csv": csv_rows, "metrics": histories}
    result: dict[str, Any] = {"identical": state(folder) == state(whole)}
    for name, read in found.items():
        here, there = read(folder), read(whole)
        result[name] = lost_and_doubled(here, there)
        result[f"{name} equal"] = here == there
    statuses = mlflow_runs(folder)
    result["status"] = list(statuses.values())[-1]
    return result


def plans(kills: int, randomness: random.Random, seconds: float) -> list[dict[str, Any]]:
    """Each phase once at a random step, the rest at random moments of the ``seconds`` that a run trains."""
    from fault_plugs import PHASES

    saved = (3, 6, 9)  # steps at which a checkpoint is written
    fixed = {"checkpoint bytes": saved, "checkpoint before rename": saved, "checkpoint before last.ckpt": saved}
    # Before the validation of step 6 nothing is saved; the metrics of the others would be logged after the checkpoint.
    fixed |= {"right after a checkpoint": (3, 9), "validation": (4, 6, 8), "optimiser step": tuple(range(STEPS))}
    # The first are those a handful of kills is to cover.
    first = [
        "right after a checkpoint",
        "clock",
        "MLflow transaction",
        "checkpoint bytes",
        "rollout",
        "reward",
        "backward",
    ]
    names = first + [name for name in PHASES if name not in first]
    names += ["clock"] * max(0, kills - len(names))
    made: list[dict[str, Any]] = []
    for name in names[:kills]:
        if name == "clock":
            made.append({"phase": "clock", "seconds": round(randomness.uniform(0.0, 0.8 * seconds), 3)})
        else:
            made.append({"phase": name, "step": randomness.choice(fixed.get(name, range(1, STEPS)))})
    return made


def survived(
    start: Callable[..., int], folder: Path, plan: dict[str, Any], randomness: random.Random
) -> dict[str, Any]:
    """Kill by ``plan``, perhaps again by the clock, then let the run end."""
    configure(folder)
    deaths: list[int] = []
    saved: list[int] = []
    left: list[list[str]] = []
    stops = (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT)
    clock = plan["phase"] == "clock"
    status = run(start, folder, None if clock else plan, plan["seconds"] if clock else 0.0)
    if clock and status == 0:  # it was quicker than the one that was timed
        shutil.rmtree(folder)
        return survived(start, folder, {**plan, "seconds": plan["seconds"] / 2}, randomness)
    while status in stops:
        deaths.append(status)
        saved.append(saved_step(folder))
        left.append(list(mlflow_runs(folder).values())[-1:])
        again = not plan.get("signal") and len(deaths) < MOST_KILLS and randomness.random() < 0.3
        status = run(start, folder, None, randomness.uniform(0.5, 3.0) if again else 0.0)
    assert status == 0, f"{plan}: status {status}\n{(folder / 'log.txt').read_text()[-3000:]}"
    return {**plan, "died of": deaths, "resumed from": saved, "left as": left}


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    last = latest(folder / "out")
    return 0 if last is None else torch.load(last, weights_only=True)["global_step"]


def stops(kills: int) -> list[dict[str, Any]]:
    """Signals that ask a run to stop: in a validation, and with many ``kills`` before one and elsewhere."""
    places = [("validation", 4), ("backward", 1), ("rollout", 2), ("rollout", 3), ("reward", 5), ("optimiser step", 7)]
    chosen = places if kills >= len(places) else places[:1]
    return [{"phase": phase, "step": step, "signal": "SIGTERM"} for phase, step in chosen]


def main(folder: Path, kills: int, commands: int) -> None:
    """Print the table of ``kills`` kills, then of the stops."""
    import frpo.cli.parsing
    import frpo.cli.training  # noqa: F401

    torch.set_num_threads(1)
    randomness = random.Random(20)
    whole = folder / "whole"
    configure(whole)
    assert run(forked, whole) == 0, (whole / "log.txt").read_text()[-3000:]
    checkpoints = whole / "out" / "checkpoints"
    seconds = (checkpoints / "last.ckpt").stat().st_mtime - (whole / "out" / "environment.json").stat().st_mtime
    with sqlite3.connect(whole / "mlflow.db") as source, sqlite3.connect(folder / "mlflow.db") as tables:
        source.backup(tables)
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            tables.execute(f"delete from {table}")
    table = []
    for number, plan in enumerate([*plans(kills, randomness, seconds), *stops(kills)]):
        start = command if number < commands else forked
        outcome = survived(start, folder / f"{number:02d}", plan, randomness)
        table.append({**outcome, "process": start.__name__, **compared(folder / f"{number:02d}", whole)})
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
