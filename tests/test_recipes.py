"""Every YAML file that ships is read, resolved and built; nothing heavy is loaded."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule

from frpo.cli.parsing import FrpoCLI
from frpo.cli.recipes import names
from frpo.foundation.shipped import shipped
from frpo.foundation.yaml_files import read_with_includes
from frpo.modules.strategy import check_fsdp1
from frpo.objectives import FRPO, GRPO

ROOT = shipped("recipes").parent
STUDIES = shipped("recipes") / "studies"  # grids of runs, tested with the study
MEASURED = shipped("recipes") / "reward_model" / "refusal_agreement.yaml"  # tested with `frpo agreement`
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in shipped("recipes").rglob("*.yaml")
    if STUDIES not in path.parents and path != MEASURED
)
FRAGMENTS = sorted(str(path.relative_to(ROOT)) for path in shipped("conf").rglob("*.yaml"))
FSDP1 = "conf/trainer/fsdp.yaml"
ANY_MACHINE = ["--trainer.accelerator", "cpu"]  # what asks for GPUs is built all the same


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where there are neither recipes nor an MLflow server, and a judge has been chosen."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("JUDGE_MODEL", "some-judge")  # conf/evaluation/safety_chat.yaml has no default for it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["frpo"])


@cache
def build(*files: str, words: tuple[str, ...] = ()) -> FrpoCLI:
    return FrpoCLI("fit", [*(word for file in files for word in ("--config", file)), *ANY_MACHINE, *words])


def included_by_recipes() -> set[str]:
    sources = {document.source for recipe in RECIPES for document in read_with_includes(str(ROOT / recipe))}
    return {str(Path(source).resolve().relative_to(ROOT)) for source in sources}


def test_there_are_recipes_and_fragments():
    assert len(RECIPES) >= 9
    assert len(FRAGMENTS) >= 10
    assert set(RECIPES) <= {f"recipes/{name}.yaml" for name in names()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_built_and_gives_itself_back(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli = build(recipe)
    assert isinstance(cli.model, LightningModule)
    assert cli.model.policy_model is None, "a constructor has loaded the policy"
    assert cli.trainer.max_steps > 0 or cli.trainer.max_epochs > 0
    assert cli.trainer.loggers
    assert cli.trainer.checkpoint_callback is not None
    assert "changes the class" not in capsys.readouterr().err
    full = tmp_path / "full.yaml"
    full.write_text(cli.config_text())
    assert build(str(full)).config_text() == cli.config_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_needs_how_it_is_run_and_what_to_expect(recipe: str):
    text = (ROOT / recipe).read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert len(header[0]) > 10
    for part in ("# Needs:", f"# Launch:  frpo fit --config {recipe}", "# Expect:"):
        assert any(line.startswith(part) for line in header), part
    for path in re.findall(r"(?:conf|recipes)/[\w/]+\.yaml", "\n".join(header)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_fragment_is_part_of_a_recipe_or_fits_on_one(fragment: str):
    assert (ROOT / fragment).read_text().startswith("# "), "the first line says what it is"
    if fragment not in included_by_recipes() and fragment != FSDP1:
        build("recipes/tiny/frpo.yaml", fragment)


@pytest.mark.parametrize("file", [*RECIPES, *FRAGMENTS, "README.md"])
def test_our_own_classes_are_named_without_their_module(file: str):
    text = (ROOT / file).read_text()
    assert re.findall(r"class_path: *frpo\..*|init_args\.[a-z_]*\.init_args.*", text) == []


def test_fsdp1_is_built_as_its_fragment_says():
    # Lightning refuses its own class on a machine without a GPU; the settings are those of the fragment.
    strategy = build(
        "recipes/tiny/frpo.yaml", FSDP1, words=("--trainer.strategy.class_path", "sharded_runs.FSDP1OnCPU")
    ).trainer.strategy
    assert strategy.sharding_strategy.name == "FULL_SHARD"
    check_fsdp1(strategy)
    assert strategy._timeout == timedelta(minutes=30)


@pytest.mark.parametrize("recipe", ["recipes/tiny/frpo.yaml", "recipes/smollm2/safety_frpo.yaml"])
@pytest.mark.parametrize("fragment", [fragment for fragment in FRAGMENTS if "/debug/" in fragment])
def test_a_debug_fragment_fits_on_every_kind_of_data(recipe: str, fragment: str):
    assert build(recipe, fragment).trainer.max_steps <= 50


@pytest.mark.parametrize("pair", [("tiny/frpo", "tiny/grpo"), ("smollm2/safety_frpo", "smollm2/safety_grpo")])
def test_a_baseline_differs_in_name_and_objective_alone(pair: tuple[str, str]):
    ours, baseline = (yaml.safe_load(build(f"recipes/{name}.yaml").config_text()) for name in pair)
    assert ours["model"]["init_args"].pop("objective") != baseline["model"]["init_args"].pop("objective")
    assert ours.pop("name") != baseline.pop("name")
    assert ours == baseline


def published(name: str) -> dict[str, Any]:
    cli = build(f"recipes/published/{name}.yaml")
    model, settings = cli.model, cli.config.model.init_args
    return {
        "path": model.policy.path,
        "adapter": (model.policy.adapter.r, model.policy.adapter.alpha),
        "objective": (type(model.objective), getattr(model.objective, "lam", None)),
        "scale_rewards": getattr(model.objective, "scale_rewards", False),
        "beta": model.kl.beta.value(0),
        "lr": settings.optimizer.init_args.lr,
        "completion": (model.sampler.max_new_tokens, model.sampler.temperature, model.sampler.top_p),
        "groups": (model.group_size, cli.datamodule.batch_size * cli.trainer.num_devices),
        "norm": model.max_grad_norm,
        "length": (cli.trainer.max_steps, cli.trainer.max_epochs),
    }


SAFETY = {
    "adapter": (64, 64),
    "lr": 1e-5,
    "completion": (2048, 1.0, 0.9),
    "groups": (8, 16),
    "norm": 1.0,
    "length": (500, -1),
    "scale_rewards": False,
}
MISTRAL, QWEN = "mistralai/Mistral-7B-Instruct-v0.1", "Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("safety_mistral_frpo", {"path": MISTRAL, "objective": (FRPO, 0.5), "beta": 2e-3, **SAFETY}),
        (
            "safety_mistral_grpo",
            {**SAFETY, "path": MISTRAL, "objective": (GRPO, None), "scale_rewards": True, "beta": 0.1},
        ),
        (
            "safety_mistral_sam_grpo",
            {
                **SAFETY,
                "path": MISTRAL,
                "objective": (GRPO, None),
                "scale_rewards": True,
                "beta": 0.1,
                "completion": (2048, 1.0, 1.0),
            },
        ),
        ("safety_qwen_frpo", {"path": QWEN, "objective": (FRPO, 0.5), "beta": 2e-3, **SAFETY}),
        (
            "maths_frpo",
            {
                "path": "Qwen/Qwen2.5-Math-7B",
                "adapter": (64, 128),
                "objective": (FRPO, 2.0),
                "beta": 1e-4,
                "lr": 6e-6,
                "completion": (2048, 1.0, 1.0),
                "groups": (8, 64),
                "norm": 0.5,
                "length": (-1, 3),
                "scale_rewards": False,
            },
        ),
    ],
)
def test_the_published_recipes_hold_the_published_settings(name: str, expected: dict[str, Any]):
    assert published(name) == expected


@pytest.mark.parametrize(("name", "decay"), [("safety_mistral_frpo", 0.1), ("safety_qwen_frpo", 1e-4)])
def test_the_published_safety_runs_warm_up_and_decay(name: str, decay: float):
    cli = build(f"recipes/published/{name}.yaml")
    assert cli.config.model.init_args.optimizer.init_args.weight_decay == decay
    factor = cli.model.lr_schedule.value
    assert [factor(0), factor(25), factor(50)] == [0.0, 0.5, 1.0]
    assert factor(275) == pytest.approx(0.5)
    assert factor(500) == pytest.approx(0.0, abs=1e-12)


def downstream(name: str) -> dict[str, Any]:
    cli = build(f"recipes/downstream/{name}.yaml")
    model, settings = cli.model, cli.config.model.init_args
    adapter = model.policy.adapter
    steps, warmup = model.lr_schedule.steps, model.lr_schedule.warmup
    return {
        "adapter": None if adapter is None else (adapter.r, adapter.alpha, adapter.dropout),
        "lr": (settings.optimizer.init_args.lr, model.lr_schedule.value(steps)),
        "warmup": round(warmup / steps, 2),
        "steps": steps,
        "batch": (cli.datamodule.batch_size, cli.trainer.num_devices, cli.datamodule.max_length),
        "rows": cli.datamodule.sources["train"].limit,
        "regularised": (model.max_grad_norm, settings.optimizer.init_args.weight_decay),
        "length": (cli.trainer.max_steps, cli.trainer.max_epochs),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca", {"adapter": None, "lr": (1e-6, 1.0), "warmup": 0.05, "steps": 1250, "rows": 40_000}),
        ("gsm8k", {"adapter": None, "lr": (6e-6, 0.0), "warmup": 0.25, "steps": 233, "rows": None}),
        ("code", {"adapter": (16, 32, 0.05), "lr": (5e-5, 0.0), "warmup": 0.03, "steps": 781, "rows": 50_000}),
    ],
)
def test_the_downstream_recipes_hold_the_published_settings(name: str, expected: dict[str, Any]):
    code = name == "code"
    expected["batch"] = (8, 8, 4096) if code else (4, 8, 2048)
    expected["regularised"] = (0.3, 0.04) if code else (1.0, 0.0)
    assert downstream(name) == {**expected, "length": (-1, 1)}
