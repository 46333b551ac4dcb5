"""Every study that ships is read, and one run of each of its methods and tasks is built; nothing is loaded."""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule

from frpo.cli.parsing import FrpoCLI
from frpo.evaluation.callback import Evaluation
from frpo.foundation.shipped import shipped
from frpo.models.checkpoint import build_policy
from frpo.modules.evaluated import EvaluatedPolicy
from frpo.objectives import FRPO, GRPO
from frpo.study.cells import Cell, expand, replaced
from frpo.study.reading import read_study
from frpo.study.spec import StudySpec
from frpo.study.spelling import spelled_out

ROOT = shipped("recipes").parent
STUDIES = sorted(path.name for path in (shipped("recipes") / "studies").glob("*.yaml"))
NAMES = {"start": "/start/policy", "reference": "/reference/policy"}
HERE = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
PUBLISHED = {
    "GRPO": (GRPO, None, 0.1),
    "FRPO, lambda 5": (FRPO, 5.0, 2e-4),
    "FRPO, lambda 2": (FRPO, 2.0, 5e-4),
    "FRPO, lambda 1": (FRPO, 1.0, 1e-3),
    "FRPO, lambda 0.5": (FRPO, 0.5, 2e-3),
    "FRPO, lambda 0.2": (FRPO, 0.2, 5e-3),
    "FRPO, lambda 0.1": (FRPO, 0.1, 0.1),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["frpo"])


@cache
def study(name: str) -> StudySpec:
    return read_study(f"recipes/studies/{name}")


@cache
def chosen(name: str) -> dict[tuple[str, str], Cell]:
    """One cell of each method and of each downstream task, by kind and name."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in expand(study(name)):
        found.setdefault((cell.kind, cell.task or cell.method), cell)
    return found


RUNS = [(name, key) for name in STUDIES for key, cell in chosen(name).items() if cell.layers]


def words(layers: Any, folder: Path) -> list[str]:
    found = []
    for number, layer in enumerate(replaced(layers, NAMES)):
        file = folder / f"layer{number}.yaml"
        file.write_text(yaml.safe_dump(spelled_out(layer), sort_keys=False))
        found += ["--config", str(file)]
    return found


@cache
def build(name: str, key: tuple[str, str]) -> FrpoCLI:
    with tempfile.TemporaryDirectory() as folder:
        return FrpoCLI("fit", words(chosen(name)[key].layers, Path(folder)) + HERE)


def test_the_studies_ship():
    assert {"tiny.yaml", "tiny_controls.yaml", "published_safety.yaml"} <= set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_needs_and_how_it_is_run(name: str):
    header = [line for line in (ROOT / "recipes" / "studies" / name).read_text().splitlines() if line.startswith("#")]
    assert header[0].endswith((".", "?")), "the first line is what `frpo recipes ls` shows, alone"
    for part in ("# Needs:", f"# Launch:  frpo study run recipes/studies/{name}"):
        assert any(line.startswith(part) for line in header), part
    for path in re.findall(r"(?:conf|recipes)/[\w/]+\.yaml", "\n".join(header)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(("name", "key"), RUNS)
def test_a_run_of_a_study_is_built(name: str, key: tuple[str, str]):
    cli, cell = build(name, key), chosen(name)[key]
    assert isinstance(cli.model, LightningModule)
    assert cli.model.policy.path == "/start/policy"
    assert cli.model.policy_model is None, "a constructor has loaded the policy"
    callbacks = [callback for callback in cli.trainer.callbacks if isinstance(callback, Evaluation)]
    if cell.kind == "policy":
        assert not callbacks, "a policy is measured once, when it is trained"
        return
    (callback,) = callbacks
    assert set(callback.suites) == set(study(name).suites) - set(study(name).policy_only)
    paths = {path for suite in callback.suites.values() for path in suite.kl_to.values()}
    assert paths <= set(NAMES.values())


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_takes_as_it_is_can_be_described_and_measured(name: str, tmp_path: Path):
    taken = [cell.policy for cell in chosen(name).values() if cell.kind == "policy" and not cell.layers]
    assert taken
    for policy in taken:
        assert build_policy(spelled_out(policy)) is not None
    layer = {"model": {"policy": taken[0]}, "evaluation": {"suites": study(name).suites}}
    cli = FrpoCLI("evaluate", words([layer], tmp_path) + HERE, model=EvaluatedPolicy)
    assert cli.model.policy_model is None


def test_the_published_study_holds_the_published_settings():
    name = "published_safety.yaml"
    found = {}
    for kind, method in chosen(name):
        if kind == "policy" and method != "base":
            model = build(name, (kind, method)).model
            found[method] = (type(model.objective), getattr(model.objective, "lam", None), model.kl.beta.value(0))
    assert found == PUBLISHED
    assert [entry.name for entry in study(name).downstream] == ["alpaca", "gsm8k", "code"]
    assert study(name).every_n_train_steps == 50
    callbacks = build(name, ("downstream", "code")).trainer.callbacks
    (evaluation,) = [callback for callback in callbacks if isinstance(callback, Evaluation)]
    limits = {suite: settings.prompts.limit for suite, settings in evaluation.suites.items()}
    assert limits == {"strongreject": None, "harmbench": 100, "harmful": 128, "harmless": 128, "gsm8k": 256}
    for suite in ("strongreject", "harmbench", "harmful", "harmless"):
        sampler = evaluation.suites[suite].sampler
        assert (sampler.max_new_tokens, sampler.temperature) == (512, 0.0)
