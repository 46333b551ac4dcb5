"""A configuration names frpo's own classes without their module, and gives plain keys where the class is clear."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from frpo.models.checkpoint import build_policy
from frpo.tiny.policy import TinyPolicy

SHORT = """
include: [recipes/tiny/frpo.yaml]
model:
  objective: {class_path: FRPO, init_args: {lam: 0.7, estimator: Naive}}
  kl: {beta: 0.11, estimator: full}
  reward: {class_path: Router, init_args: {routes: {risky: Caution, benign: {class_path: Length, init_args: {low: 3}}}}}
evaluation:
  suites:
    asked:
      prompts: {class_path: TinySource, init_args: {split: held_out, seed: "${seed_everything}"}}
      scores: {safety: TinyRisky}
      seed: ${seed_everything}
"""
LONG = """
include: [recipes/tiny/frpo.yaml]
model:
  class_path: frpo.modules.policy_optimization.PolicyOptimization
  init_args:
    objective:
      class_path: frpo.objectives.FRPO
      init_args: {lam: 0.7, estimator: {class_path: frpo.estimators.Naive}}
    kl: {class_path: frpo.penalty.KLPenalty, init_args: {beta: 0.11, estimator: full}}
    reward:
      class_path: frpo.rewards.Router
      init_args:
        routes:
          risky: {class_path: frpo.rewards.old_rules.Caution}
          benign: {class_path: frpo.rewards.rules.Length, init_args: {low: 3}}
evaluation:
  suites:
    asked:
      class_path: frpo.evaluation.suite.Suite
      init_args:
        prompts:
          class_path: frpo.tiny.TinySource
          init_args: {split: held_out, seed: "${seed_everything}"}
        scores: {safety: {class_path: frpo.tiny.rewards.TinyRisky}}
        seed: ${seed_everything}
"""
NAME = "recipes/tiny/frpo.yaml"


@pytest.fixture
def printed(folder: Path, frpo: Any) -> Any:
    """The full configuration of ``frpo fit --config ... WORDS``, and what was warned of."""

    def run(text: str, *words: str) -> tuple[dict[str, Any], str]:
        (folder / "own.yaml").write_text(text)
        status, out, err = frpo("fit", "--config", "own.yaml", *words, "--print_config")
        assert status == 0, err
        (folder / "printed.yaml").write_text(out)
        return yaml.safe_load(out), err

    return run


def test_short_and_long_spelling_are_one_configuration_that_can_be_given_back(printed: Any, folder: Path):
    short, _ = printed(SHORT)
    long, _ = printed(LONG)
    assert short == long
    model = short["model"]["init_args"]
    assert model["objective"]["init_args"]["estimator"] == {"class_path": "frpo.estimators.Naive"}
    assert model["kl"]["init_args"]["beta_scale"] == "objective", "the recipe's other settings stay"
    suite = short["evaluation"]["suites"]["asked"]
    assert suite["init_args"]["seed"] == suite["init_args"]["prompts"]["init_args"]["seed"] == "${seed_everything}"
    again, _ = printed("include: [printed.yaml]")
    assert again == short


def test_the_command_line_names_classes_and_settings_as_briefly(printed: Any):
    found, err = printed(
        SHORT, "--model.objective.lam", "0.3", "--model.objective.estimator", "Jackknife", "--model.kl.beta", "0.2",
        "--model.policy", "frpo.models.tiny.TinyPolicy",
        "--trainer.callbacks+={class_path: CompletionTable, init_args: {output_dir: x}}",
        "--model.reward.routes.risky", "StepList",
    )  # fmt: skip
    model = found["model"]["init_args"]
    assert model["objective"]["init_args"]["lam"] == 0.3
    assert model["objective"]["init_args"]["estimator"]["class_path"] == "frpo.estimators.Jackknife"
    assert model["kl"]["init_args"]["beta"] == 0.2
    assert model["policy"]["class_path"] == "frpo.tiny.policy.TinyPolicy"
    assert found["trainer"]["callbacks"][-1]["class_path"] == "frpo.run.completion_table.CompletionTable"
    routes = model["reward"]["init_args"]["routes"]
    assert routes["risky"]["class_path"] == "frpo.rewards.rules.StepList"
    assert routes["benign"]["class_path"] == "frpo.rewards.rules.Length"
    assert "replaces the mapping" not in err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("objective: {class_path: FRPOO}", "objective.class_path: no Objective is called 'FRPOO'; did you mean "),
        ("objective: {estimator: Jacknife}", "no Estimator is called 'Jacknife'; did you mean Jackknife?"),
        ("reference: AdapterDisable", "no Reference is called 'AdapterDisable'; did you mean AdapterDisabled?"),
        ("reference: Router", "frpo.rewards.router.Router is no Reference"),
        ("kl: {betta: 1}", "kl.init_args.betta: unknown key; did you mean model.init_args.kl.init_args.beta?"),
    ],
)  # fmt: skip
def test_a_mistyped_name_is_answered_with_the_nearest(folder: Path, frpo: Any, setting: str, said: str):
    (folder / "own.yaml").write_text(f"include: [{NAME}]\nmodel: {{{setting}}}")
    status, _, err = frpo("fit", "--config", "own.yaml")
    assert status == 2
    assert said in err


def test_a_class_of_the_same_name_elsewhere_does_not_disturb_ours(
    printed: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "namesake.py").write_text(
        "from frpo.rewards.base import Reward\n\nclass TinyRisky(Reward):\n    def __call__(self, completions): ...\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    own = "model: {reward: {routes: {risky: TinyRisky, benign: namesake.TinyRisky}}}"
    found, _ = printed(f"include: [{NAME}]\n{own}")
    found, _ = printed(f"include: [{NAME}]\n{own}")  # the second is imported by now
    routes = found["model"]["init_args"]["reward"]["init_args"]["routes"]
    assert [route["class_path"] for route in routes.values()] == ["frpo.tiny.rewards.TinyRisky", "namesake.TinyRisky"]
    monkeypatch.delitem(sys.modules, "namesake")


def test_a_mapping_by_name_is_replaced_and_that_is_said(printed: Any):
    found, err = printed(f"include: [{NAME}]\nmodel: {{reward: {{routes: {{risky: Caution}}}}}}")
    assert list(found["model"]["init_args"]["reward"]["init_args"]["routes"]) == ["risky"]
    assert "model.init_args.reward.init_args.routes: own.yaml replaces the mapping: dropped benign" in err
    anew = "{class_path: Router, init_args: {routes: {risky: Caution}}}"
    _, err = printed(f"include: [{NAME}]\nmodel: {{reward: {anew}}}")
    assert "replaces the mapping" not in err, "a class that is described anew is described in full"


def test_a_mistyped_judge_of_an_agreement_is_answered_with_the_nearest(folder: Path, frpo: Any):
    (folder / "own.yaml").write_text("agreement: {labels: [], rewards: {phrases: RefusalPhrase}}")
    status, _, err = frpo("agreement", "--config", "own.yaml")
    assert status == 2
    assert (
        "agreement.rewards.phrases.class_path: no Reward is called 'RefusalPhrase'; did you mean RefusalPhrases?" in err
    )


def test_a_policy_described_before_a_move_is_built():
    for described in ("frpo.models.tiny.TinyPolicy", "TinyPolicy"):
        policy = build_policy({"class_path": described, "init_args": {"seed": 3}})
        assert isinstance(policy, TinyPolicy)
        assert policy.seed == 3
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        build_policy({"class_path": "frpo.models.tiny.NoPolicy"})


def test_a_name_that_a_document_gives_twice_over_is_refused_before_anything_is_built(
    folder: Path, frpo: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("frpo.foundation.class_names.homes", lambda: {"FRPO": ("frpo.objectives", "frpo.other")})
    (folder / "own.yaml").write_text("model: {objective: {class_path: FRPO}}")
    status, _, err = frpo("fit", "--config", "own.yaml")
    assert status == 2
    assert "'FRPO', the name of 2 classes; write frpo.objectives.FRPO or frpo.other.FRPO" in err
