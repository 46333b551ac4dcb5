"""Whatever a configuration or a command line holds, it is read or refused by name: no traceback, no code run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from fuzzing import TOKENS, VALUES, damaged, fuzzed, mutated, outcome, randoms
from hypothesis import given
from hypothesis import strategies as st

from frpo.cli.arguments import split_arguments
from frpo.cli.parsing import FrpoCLI
from frpo.foundation.errors import ConfigError
from frpo.foundation.shipped import shipped
from frpo.foundation.yaml_files import read_with_includes
from frpo.study.cells import expand
from frpo.study.reading import read_study

FILES = sorted([*shipped("conf").rglob("*.yaml"), *shipped("recipes").rglob("*.yaml")])
RECIPES = [file for file in FILES if file.is_relative_to(shipped("recipes")) and "studies" not in file.parts]
STUDIES = sorted((shipped("recipes") / "studies").glob("*.yaml"))
WORDS = (
    *("--config", "-c", "--include", "--print_config", "--model", "--model.lr", "--trainer.max_steps", "--model.help"),
    *("conf/trainer/cpu.yaml", "recipes/tiny/grpo.yaml", "{a: 1}", "[1, 2", "=", "--", "-", "--=", "x" * 5000, "\0"),
    *("--trainer", "--model.init_args.optimizer+", "--a.b.c=1", "--.", "--..=x", "/dev/null", "/", "a/b.yaml"),
)

KEYS = (
    *("model", "model.init_args.policy", "model.init_args.optimizer", "model.init_args.objective", "trainer"),
    *("trainer.callbacks", "trainer.max_steps", "data", "name", "evaluation"),
    *("evaluation.suites", "output_dir", "model.init_args.reward", "model.class_path", "seed_everything"),
    *("trainer.logger", "model.init_args"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["frpo"])
    return tmp_path


@pytest.fixture
def unbuilt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configurations are read in full, and nothing is built from them."""
    monkeypatch.setattr(FrpoCLI, "instantiate_classes", lambda self: None)
    return folder


def parsed(*words: str) -> list[str] | None:
    """The configuration in full, as lines."""
    try:
        return FrpoCLI("fit", list(words)).config_text().splitlines()
    except SystemExit as stop:  # what explains a class, or prints the configuration
        if stop.code:
            raise
        return None


@fuzzed(400)
@given(data=st.binary(max_size=300) | st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join))
def test_any_bytes_are_a_configuration_or_refused(folder, data):
    (folder / "any.yaml").write_bytes(data)
    outcome(lambda: read_with_includes("any.yaml"), ConfigError, "any.yaml")


@fuzzed(400)
@given(draw=randoms, file=st.sampled_from(FILES))
def test_a_damaged_file_is_a_configuration_or_refused(folder, draw, file):
    (folder / "bad.yaml").write_bytes(damaged(file.read_bytes(), draw))
    outcome(lambda: read_with_includes("bad.yaml"), ConfigError, "bad.yaml")


@fuzzed(200)
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=20), max_size=8))
def test_any_words_are_a_command_line_or_refused(folder, words):
    outcome(lambda: split_arguments(words), ConfigError, "")


@fuzzed(40)
@given(draw=randoms, file=st.sampled_from(RECIPES))
def test_a_recipe_with_changed_settings_is_parsed_or_refused(unbuilt, draw, file):
    tree = yaml.safe_load(file.read_text())
    (unbuilt / "changed.yaml").write_text(yaml.safe_dump(mutated(tree, draw), sort_keys=False))
    outcome(lambda: parsed("--config", "changed.yaml"), ConfigError, "")
    assert not (unbuilt / "PWNED").exists()


@fuzzed(30)
@given(
    keys=st.sampled_from(KEYS),
    value=st.sampled_from([str(v) if isinstance(v, str) else yaml.safe_dump(v) for v in VALUES if v != "\ud800"])
    | st.sampled_from([t.decode(errors="replace") for t in TOKENS])
    | st.text(max_size=10),
)
def test_any_option_over_a_recipe_is_parsed_or_refused(unbuilt, keys, value):
    words = ("--config", "recipes/tiny/grpo.yaml", f"--{keys}={value}")
    outcome(lambda: parsed(*words), ConfigError, "")
    assert not (unbuilt / "PWNED").exists()


@fuzzed(150)
@given(draw=randoms, file=st.sampled_from(STUDIES))
def test_a_changed_study_is_read_or_refused(folder, draw, file):
    (folder / "study.yaml").write_text(yaml.safe_dump(mutated(yaml.safe_load(file.read_text()), draw), sort_keys=False))
    outcome(lambda: expand(read_study("study.yaml")), ConfigError, "")
