"""What the pages and docstrings say is there, is true, and runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from pkgutil import iter_modules, walk_packages
from types import ModuleType

import pytest
import torch
import yaml

import frpo

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "recipes/README.md", "recipes/studies/README.md")
FUNCTIONAL = [f"frpo.functional.{found.name}" for found in iter_modules([str(ROOT / "frpo" / "functional")])]
MOST_LINES = 15
"""Of one block of code in CONTRIBUTING.md."""


# ------------------------------------------------------------------------------------------------------- docstrings


def public(members: dict[str, object], module: str) -> dict[str, object]:
    """The classes, functions and properties defined in ``module`` whose names start without an underscore."""
    kinds = (type, staticmethod, classmethod, property)
    return {
        name: member
        for name, member in members.items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, kinds))
        and getattr(member, "__module__", module) == module
    }


def undocumented(module: ModuleType) -> list[str]:
    """Public names without a docstring; that of a base class's method is enough for a method."""
    names = [] if module.__doc__ else [module.__name__]
    for name, member in public(vars(module), module.__name__).items():
        own = member.__doc__ or ""
        generated = inspect.isclass(member) and own.startswith(f"{name}(")  # a dataclass's signature
        if not own or generated:
            names.append(f"{module.__name__}.{name}")
        if inspect.isclass(member):
            methods = public(dict(vars(member)), module.__name__)
            names += [f"{module.__name__}.{name}.{m}" for m in methods if not inspect.getdoc(getattr(member, m))]
    return names


def test_every_public_name_has_a_docstring():
    modules = [import_module(found.name) for found in walk_packages(frpo.__path__, "frpo.")]
    assert [name for module in (frpo, *modules) for name in undocumented(module)] == []


def test_a_name_without_a_docstring_is_found():
    module = ModuleType("bare")
    exec("class A:\n    'Said.'\n    def said(self): 'Yes.'\n    def bare(self): ...\ndef f(): ...", vars(module))
    assert undocumented(module) == ["bare", "bare.A.bare", "bare.f"]


@pytest.mark.parametrize("module", [*FUNCTIONAL, "frpo.estimators", "frpo.schedules", "frpo.penalty"])
def test_the_examples_in_docstrings_are_true(module: str):
    results = doctest.testmod(import_module(module))
    assert results.failed == 0
    assert results.attempted > 0


@pytest.mark.parametrize("module", FUNCTIONAL)
def test_every_equation_has_an_example(module: str):
    loaded = import_module(module)
    functions = [member for member in public(vars(loaded), module).values() if inspect.isfunction(member)]
    assert functions
    assert [function.__name__ for function in functions if ">>> " not in (function.__doc__ or "")] == []


# ------------------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_and_links_that_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
    for name in re.findall(r"\b(?:conf|recipes|frpo|tests|\.ci)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_modules_and_classes_that_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in set(re.findall(r"\bfrpo(?:\.\w+)+", text)):
        parent, _, last = path.rpartition(".")
        try:
            import_module(path)
        except ModuleNotFoundError:
            assert hasattr(import_module(parent), last), path


def test_every_recipe_is_listed():
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    recipes = sorted(path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
    assert [recipe for recipe in recipes if f"`{recipe.removesuffix('.yaml')}`" not in listed] == []


# ------------------------------------------------------------------------------------------- the code of CONTRIBUTING


def blocks(language: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of CONTRIBUTING.md, importable from the working folder, and its YAML files beside it."""
    (tmp_path / "mine.py").write_text("\n\n".join(blocks("python")))
    for block in blocks("yaml"):
        (tmp_path / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.argv", ["frpo"])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return import_module("mine")


def test_a_part_takes_less_than_fifteen_lines():
    assert len(blocks("python")) == len(blocks("yaml")) == 4
    assert max(block.count("\n") for block in (*blocks("python"), *blocks("yaml"))) < MOST_LINES


def test_the_estimator_of_the_page_is_consistent(mine: ModuleType):
    log_u = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False], [True, True] + [False] * 3])
    derivative = torch.autograd.grad(mine.Delta().log_mean(log_u, mask).sum(), log_u)[0]
    torch.testing.assert_close(mine.Delta().weights(log_u, mask).detach(), derivative)
    assert mine.Delta().log_mean(torch.ones(4)).item() == pytest.approx(1.0)


QUICK = """
include: [conf/debug/limit.yaml]
trainer: {max_steps: 2, limit_val_batches: 0, logger: false}
model:
  init_args:
    policy: {class_path: frpo.models.policy.Policy, init_args: {path: PATH}}
    sampler: {init_args: {max_new_tokens: 4}}
evaluation:
  suites:
    riddles:
      sampler: {class_path: frpo.rollouts.in_process.InProcessSampler, init_args: {max_new_tokens: 4, temperature: 0.0}}
"""


def test_the_parts_of_the_page_train_and_measure(mine: ModuleType, model_dir: Path, tmp_path: Path):
    from frpo.cli.parsing import FrpoCLI

    (tmp_path / "quick.yaml").write_text(QUICK.replace("PATH", str(model_dir)))
    added = [block.partition("\n")[0].removeprefix("# ") for block in blocks("yaml")]
    files = ["recipes/tiny/frpo.yaml", *added, "quick.yaml"]
    cli = FrpoCLI("fit", [word for file in files for word in ("--config", file)])
    module = cli.model
    assert isinstance(module.objective.estimator, mine.Delta)
    assert isinstance(module.kl.beta, mine.Halving)
    assert isinstance(module.reward, mine.Concise)
    cli.trainer.fit(module, cli.datamodule)
    assert cli.trainer.global_step == 2
    measured = sorted(Path("outputs").rglob("evaluation/riddles/*.jsonl"))
    assert [file.name for file in measured] == ["step=000000.jsonl", "step=000002.jsonl"]


# ------------------------------------------------------------------------------------------------------ dependencies


def imported() -> set[str]:
    """The top-level modules that ``frpo`` imports, inside functions too, without itself and the standard library."""
    names = set()
    for file in (ROOT / "frpo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"frpo"}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}
    distributions = packages_distributions()
    provided = {name: {normal(d) for d in distributions.get(name, [name])} for name in imported()}
    assert {name for name, by in provided.items() if not by & declared} == set()


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_hooks_run_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == commands
