from __future__ import annotations

from pathlib import Path

import evaluation_toys as toys
import pytest
import runs
import yaml

from frpo.models.export import export_policy
from frpo.models.policy import LoRA, Policy
from frpo.run import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

SUITES = """
evaluation:
  suites:
    s0:
      class_path: frpo.evaluation.suite.Suite
      init_args:
        prompts: {class_path: runs.Words, init_args: {n: 7}}
        scores: {graded: {class_path: runs.Graded}}
        sampler: {class_path: frpo.rollouts.in_process.InProcessSampler, init_args: {max_new_tokens: 5}}
        samples: 2
        batch_size: 3
        max_prompt_length: 16
"""
CPU = ("--trainer.accelerator", "cpu", "--output_dir", "out")


@pytest.fixture
def suites(folder: Path) -> str:
    (folder / "suites.yaml").write_text(SUITES)
    return "suites.yaml"


def test_a_directory_is_evaluated_and_its_scores_are_printed(suites, frpo, model_dir, folder):
    status, out, err = frpo("evaluate", "--config", suites, "--model.policy.path", str(model_dir), *CPU)
    assert status == 0, err
    rows = toys.rows(folder / "out", 0)
    mean = sum(row["scores"]["graded"]["value"] for row in rows) / len(rows)
    (line,) = [
        line for line in out.splitlines() if line.startswith("s0") and " even " not in line and " odd " not in line
    ]
    name, quantity, shown, low, _, high, prompts, failed = line.split()
    assert (name, quantity, shown, prompts, failed) == ("s0", "graded", f"{mean:.3f}", "7", "0")
    assert float(low) < mean < float(high)


def test_a_checkpoint_is_evaluated_as_during_its_run(suites, frpo, model_dir, folder):
    module = runs.module(model_dir, policy=Policy(str(model_dir), adapter=LoRA(r=4, alpha=8)))
    callbacks = [toys.evaluation(folder / "run", toys.drawn()), Checkpoint("run")]
    runs.trainer(folder, max_steps=2, callbacks=callbacks, enable_checkpointing=True).fit(
        module, datamodule=runs.data()
    )
    status, _, err = frpo("evaluate", "--config", suites, "--ckpt_path", "run/checkpoints/last.ckpt", *CPU)
    assert status == 0, err
    assert toys.steps(folder / "out") == [2]
    assert toys.rows(folder / "out", 2) == toys.rows(folder / "run", 2)


def test_a_peft_directory_is_evaluated_as_trained(suites, frpo, model_dir, folder):
    module = runs.module(model_dir, policy=Policy(str(model_dir), adapter=LoRA(r=4, alpha=8)))
    callback = toys.evaluation(folder / "run", toys.drawn(kl_to={"base": str(model_dir)}))
    runs.trainer(folder, max_steps=2, callbacks=[callback]).fit(module, datamodule=runs.data())
    export_policy(module.policy_model, module.tokenizer, folder / "peft")
    (folder / "suites.yaml").write_text(
        SUITES.replace("samples: 2", f"samples: 2\n        kl_to: {{base: {model_dir}}}")
    )
    status, _, err = frpo("evaluate", "--config", suites, "--model.policy.path", "peft", *CPU)
    assert status == 0, err
    trained, alone = toys.rows(folder / "run", 2), toys.rows(folder / "out", 0)
    assert [row["completion"] for row in alone] == [row["completion"] for row in trained]
    for one, other in zip(alone, trained, strict=True):
        assert one["kl"]["base"]["sequence"] == pytest.approx(other["kl"]["base"]["sequence"], abs=1e-4)
        assert one["kl"]["base"]["sequence"] > 1e-4


def test_the_printed_configuration_gives_itself_back(suites, frpo, model_dir, folder):
    status, first, _ = frpo(
        "evaluate", "--config", suites, "--model.policy.path", str(model_dir), *CPU, "--print_config"
    )
    assert status == 0
    (folder / "full.yaml").write_text(first)
    assert frpo("evaluate", "--config", "full.yaml", "--print_config")[1] == first
    assert yaml.safe_load(first)["evaluation"]["suites"]["s0"]["init_args"]["samples"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model.policy.path", "DIR"), "evaluation.suites: there are none"),
        (("--config", "suites.yaml"), "got no policy; give a model by --model.policy.path"),
        (("--config", "suites.yaml", "--config", "base.yaml"), "model.class_path: got Line, which trains"),
        (("--config", "suites.yaml", "--ckpt_path", "none.ckpt"), "ckpt_path: no file none.ckpt"),
        (("--config", "suites.yaml", "--model.policy.path", "/"), "Policy.path: got '/'"),
        (("--evaluation.every_n_train_steps", "2", "--model.policy.path", "DIR"), "settings without suites"),
        (
            ("--config", "suites.yaml", "--evaluation.every_n_train_step", "2"),
            "did you mean evaluation.every_n_train_steps",
        ),
        (("--config", "suites.yaml", "--evaluation.output_dir", "x"), "write output_dir instead"),
    ],
)
def test_what_cannot_be_evaluated_is_answered_in_a_line(suites, frpo, model_dir, words, said):
    given = [str(model_dir) if word == "DIR" else word for word in words]
    status, _, err = frpo("evaluate", *given, *CPU)
    assert status == 2, err
    assert said in err
    assert "Traceback" not in err


def test_a_fit_runs_the_suites_of_its_configuration_before_its_checkpoints(suites, folder):
    from frpo.cli.parsing import FrpoCLI

    cli = FrpoCLI("fit", ["--config", "base.yaml", "--config", suites, "--evaluation.at_steps", "[1, 3]"])
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names.index("Evaluation") == names.index("Checkpoint") - 1
    (evaluation,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "Evaluation"]
    assert (str(evaluation.output_dir), evaluation.at_steps) == ("outputs/small", [1, 3])
    assert list(evaluation.suites) == ["s0"]
