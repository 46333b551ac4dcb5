from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import evaluation_toys as toys
import forks
import lightning as L
import pytest
import runs
import torch
from lightning.pytorch.strategies import DDPStrategy

from frpo.data.prompts.sources import FileSource
from frpo.rewards.base import Reward
from frpo.rewards.router import Router
from frpo.run import Checkpoint, RunRecord, latest
from frpo.run.metrics_csv import MetricsCSV
from frpo.types import Judgement

pytestmark = pytest.mark.filterwarnings("ignore")


class Dice(Reward):
    """A score that uses the global generators up."""

    def __call__(self, completions):
        return [Judgement.of(random.random() + float(torch.rand(()))) for _ in completions]


def fit(model_dir: Path, root: Path, *callbacks: L.Callback, resume: Path | None = None, **changes: Any) -> Any:
    settings = {name: changes.pop(name) for name in ("epochs_per_rollout", "reward") if name in changes}
    module = runs.module(model_dir, **settings)
    runs.trainer(root, callbacks=list(callbacks), **changes).fit(
        module, datamodule=runs.data(), ckpt_path=resume, weights_only=True
    )
    return module


def metrics(root: Path) -> dict[int, dict[str, float]]:
    """The evaluation's metrics by step, from metrics.csv."""
    with (root / "metrics.csv").open() as file:
        rows = [
            (int(row["step"]), {k: float(v) for k, v in row.items() if "eval/" in k and v})
            for row in csv.DictReader(file)
        ]
    return {step: found for step, found in rows if found}


def test_it_evaluates_at_the_start_every_k_steps_at_steps_and_at_the_end(model_dir, tmp_path, capsys):
    first = toys.evaluation(tmp_path / "a", toys.drawn(kl_to={"start": str(model_dir)}), every_n_train_steps=2)
    second = toys.evaluation(tmp_path / "b", at_steps=[1, 3], at_start=False)
    fit(model_dir, tmp_path, first, second, max_steps=5)
    assert toys.steps(tmp_path / "a") == [0, 2, 4, 5]
    assert toys.steps(tmp_path / "b") == [1, 3, 5]
    start, last = toys.rows(tmp_path / "a", 0), toys.rows(tmp_path / "a", 5)
    assert [(row["prompt_id"], row["sample"]) for row in start] == [(str(i), g) for i in range(7) for g in range(2)]
    assert max(abs(row["kl"]["start"]["sequence"]) for row in start) < 1e-5
    assert min(row["kl"]["start"]["sequence"] for row in last) > 1e-4
    assert start[0]["scores"]["graded"]["judge"] == "runs.Graded"
    assert "evaluation | step 4 | s0 | graded 0." in capsys.readouterr().out


def test_steps_that_a_batch_jumps_over_are_evaluated_once_it_is_done(model_dir, tmp_path):
    callback = toys.evaluation(tmp_path, every_n_train_steps=4, at_steps=[1])
    fit(model_dir, tmp_path, callback, max_steps=9, epochs_per_rollout=3)
    assert toys.steps(tmp_path) == [0, 3, 6, 9]


def test_a_run_that_ends_by_epochs_is_evaluated_at_its_end(model_dir, tmp_path):
    fit(model_dir, tmp_path, toys.evaluation(tmp_path, at_start=False), max_steps=-1, max_epochs=1)
    assert toys.steps(tmp_path) == [6]


def test_evaluation_does_not_change_what_is_trained(model_dir, tmp_path):
    suites = toys.drawn(scores={"dice": Dice()}, kl_to={"start": str(model_dir)}), toys.suite()
    settings = {"max_steps": 4, "reward": Dice(), "epochs_per_rollout": 2}
    plain = fit(model_dir, tmp_path, **settings)
    watched = fit(model_dir, tmp_path, toys.evaluation(tmp_path, *suites, every_n_train_steps=1), **settings)
    assert toys.steps(tmp_path) == [0, 2, 4]
    for name, value in runs.weights(plain).items():
        assert torch.equal(value, runs.weights(watched)[name]), name


class KilledError(Exception):
    pass


class KillBefore(L.Callback):
    """Stops the run between the evaluation of a step and its checkpoint; checkpoints come after every callback."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def parts(root: Path) -> tuple[list[L.Callback], MetricsCSV]:
    evaluation = toys.evaluation(root, toys.drawn(), every_n_train_steps=2)
    # Listed first: Lightning puts the checkpoint last.
    return [Checkpoint(str(root), every_n_train_steps=2), RunRecord(str(root)), evaluation], MetricsCSV(str(root))


def test_a_killed_and_resumed_run_has_the_evaluations_of_an_uninterrupted_one(model_dir, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    callbacks, logger = parts(whole)
    fit(model_dir, whole, *callbacks, max_steps=6, logger=logger, enable_checkpointing=True)
    callbacks, logger = parts(broken)
    with pytest.raises(KilledError):
        fit(model_dir, broken, *callbacks, KillBefore(4), max_steps=6, logger=logger, enable_checkpointing=True)
    assert latest(broken).name != "step=000004.ckpt"
    assert toys.steps(broken) == [0, 2, 4], "the evaluation of step 4 is written before its checkpoint"
    (broken / "evaluation" / "s0" / "step=000004.jsonl").write_text("torn")
    before = (broken / "evaluation" / "s0" / "step=000002.jsonl").stat().st_mtime_ns
    callbacks, logger = parts(broken)
    fit(model_dir, broken, *callbacks, max_steps=6, logger=logger, resume=latest(broken), enable_checkpointing=True)
    assert toys.steps(broken) == toys.steps(whole) == [0, 2, 4, 6]
    for step in (0, 2, 4, 6):
        assert toys.rows(broken, step) == toys.rows(whole, step)
    assert (broken / "evaluation" / "s0" / "step=000002.jsonl").stat().st_mtime_ns == before
    assert metrics(broken) == metrics(whole)
    assert list(metrics(whole)) == [0, 2, 4, 6]


def test_a_resume_evaluates_its_step_again_where_the_suite_is_another(model_dir, tmp_path):
    callbacks, _ = parts(tmp_path)
    fit(model_dir, tmp_path, *callbacks, max_steps=2, enable_checkpointing=True)
    other = toys.evaluation(tmp_path, toys.drawn(samples=3), every_n_train_steps=2)
    fit(model_dir, tmp_path, other, max_steps=3, resume=latest(tmp_path))
    assert [len(toys.rows(tmp_path, step)) for step in (0, 2, 3)] == [14, 21, 21]


def test_a_fresh_run_moves_earlier_evaluations_aside(model_dir, tmp_path):
    for last in (3, 1):
        fit(model_dir, tmp_path, toys.evaluation(tmp_path), max_steps=last)
    assert toys.steps(tmp_path) == [0, 1]
    assert (tmp_path / "evaluation.1" / "s0" / "step=000003.jsonl").is_file()


def test_means_are_logged_to_every_logger_and_equal_those_of_the_rows(model_dir, tmp_path):
    loggers = [MetricsCSV(str(tmp_path / name)) for name in "ab"]
    suite = toys.drawn(scores={"graded": runs.Graded(fail_every=3)}, kl_to={"start": str(model_dir)})
    with pytest.warns(UserWarning, match="judgements of 'graded' failed"):
        fit(model_dir, tmp_path, toys.evaluation(tmp_path, suite), max_steps=2, logger=loggers)
    found = metrics(tmp_path / "a")[2]
    assert metrics(tmp_path / "b")[2] == found
    rows = toys.rows(tmp_path, 2)
    values = [row["scores"]["graded"]["value"] for row in rows]
    kept = [value for value in values if value is not None]
    assert 0 < len(kept) < len(values)
    assert found == pytest.approx(
        {
            "eval/s0/graded": sum(kept) / len(kept),
            "eval/s0/graded/failed": 1 - len(kept) / len(values),
            "eval/s0/kl/start/sequence": sum(row["kl"]["start"]["sequence"] for row in rows) / len(rows),
            "eval/s0/kl/start/token": sum(row["kl"]["start"]["token"] for row in rows) / len(rows),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("suite", "error", "said"),
    [
        (lambda: toys.suite(prompts=FileSource("none.jsonl")), FileNotFoundError, "suite 's0': no file at"),
        (lambda: toys.suite(scores={"r": Router({"even": runs.Graded()})}), ValueError, "suite 's0': Router"),
        (lambda: toys.suite(kl_to={"start": "/"}), ValueError, "suite 's0': kl_to: Policy.path: got '/'"),
        (lambda: toys.suite(sampler=None), ValueError, "suite 's0': the longest prompt has .* positions for 128"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(model_dir, tmp_path, suite, error, said):
    class NoStep(L.Callback):
        def on_train_start(self, *args) -> None:
            pytest.fail("training started")

    with pytest.raises(error, match=said):
        fit(model_dir, tmp_path, NoStep(), toys.evaluation(tmp_path, suite()), max_steps=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"suites": {}}, "Evaluation.suites: got none"),
        ({"suites": {"a/b": toys.suite()}}, "letters, digits"),
        ({"every_n_train_steps": 0}, "every_n_train_steps: got 0"),
        ({"at_steps": [-1]}, "at_steps"),
    ],
)
def test_settings_that_make_no_evaluation_are_refused(tmp_path, changes, said):
    from frpo.evaluation.callback import Evaluation

    with pytest.raises(ValueError, match=said):
        Evaluation(**{"output_dir": str(tmp_path), "suites": {"s": toys.suite()}, **changes})


def run(model_dir: Path, out: Path, processes: int) -> None:
    torch.set_num_threads(1)
    suites = [
        toys.drawn(
            scores={"graded": runs.Graded(fail_every=3)}, kl_to={"start": str(model_dir)}, batch_size=4 // processes
        ),
        toys.suite(batch_size=2),  # 7 prompts: ranks get different numbers
    ]
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto"
    trainer = runs.trainer(
        out,
        devices=processes,
        strategy=strategy,
        max_steps=2,
        max_epochs=-1,
        logger=MetricsCSV(str(out)),
        callbacks=[toys.evaluation(out, *suites)],
    )
    trainer.fit(runs.full(model_dir), datamodule=runs.data(batch_size=4 // processes))


def test_two_processes_write_and_log_what_one_does(model_dir, tmp_path):
    for processes in (1, 2):
        assert forks.call(run, model_dir, tmp_path / str(processes), processes) == 0
    one, two = tmp_path / "1", tmp_path / "2"
    for step in (0, 2):
        assert metrics(two)[step] == pytest.approx(metrics(one)[step], rel=1e-5, abs=1e-9)
        for name in ("s0", "s1"):
            for first, second in zip(toys.rows(one, step, name), toys.rows(two, step, name), strict=True):
                kls = [row.pop("kl") for row in (first, second)]
                assert first == second
                assert kls[0].keys() == kls[1].keys()
                for key, kl in kls[0].items():
                    assert kls[1][key] == pytest.approx(kl, rel=1e-5, abs=1e-9)
