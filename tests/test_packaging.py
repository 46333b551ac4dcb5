"""The wheel holds the code, the fragments and the recipes, and works on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("frpo", "conf", "recipes", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_of_code_is_a_declared_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "frpo").rglob("*.py")}
    assert sorted(declared) == sorted(folders | {"frpo.conf", "frpo.recipes"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "--wheel-dir", str(folder), "./source", cwd=folder)
    return next(folder.glob("frpo-*.whl"))


def test_the_wheel_holds_every_module_fragment_and_recipe(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    package = (path for kind in ("*.py", "*.j2") for path in (ROOT / "frpo").rglob(kind))
    expected = {str(path.relative_to(ROOT)) for path in package}
    for folder in ("conf", "recipes"):
        expected |= {f"frpo/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.yaml")}
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_an_installed_wheel_finds_its_recipes_and_fragments(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    python = (sys.executable, "-m", "frpo")
    where = run(sys.executable, "-c", "import frpo; print(frpo.__file__)", cwd=tmp_path, **env)
    assert where.strip() == str(site / "frpo/__init__.py")
    assert len(run(*python, "recipes", "ls", cwd=tmp_path, **env).splitlines()) == len(
        list((ROOT / "recipes").rglob("*.yaml"))
    )
    run(*python, "recipes", "cp", "tiny/frpo", "mine.yaml", cwd=tmp_path, **env)
    assert "frpo.tiny.policy.TinyPolicy" in run(
        *python, "fit", "--config", "mine.yaml", "--print_config", cwd=tmp_path, **env
    )
