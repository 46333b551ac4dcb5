"""frpo's own classes are found by name, and by paths from before a move; everything else is left alone."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import frpo
from frpo.foundation import class_names
from frpo.foundation.class_names import full_path, homes, short_name, with_full_paths
from frpo.foundation.errors import ConfigError

NEVER_CONFIGURED = {"Source", "Estimate"}


def test_the_index_holds_the_classes_of_the_code_and_nothing_else():
    root = Path(frpo.__file__).parent
    defined = [
        node.name
        for file in root.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert Counter(defined) == {name: len(modules) for name, modules in homes().items()}
    assert {name for name, number in Counter(defined).items() if number > 1} <= NEVER_CONFIGURED


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("FRPO", "frpo.objectives.FRPO"),
        ("frpo.objectives.FRPO", "frpo.objectives.FRPO"),
        ("frpo.FRPO", "frpo.objectives.FRPO"),
        ("frpo.models.tiny.TinyPolicy", "frpo.tiny.policy.TinyPolicy"),
        ("frpo.data.sources.FileSource", "frpo.data.prompts.sources.FileSource"),
        ("frpo.callbacks.Checkpoint", "frpo.run.checkpoint.Checkpoint"),
        ("frpo.tracking.MLflowTracker", "frpo.run.tracker.MLflowTracker"),
        ("frpo.rewards.NoSuchReward", "frpo.rewards.NoSuchReward"),
        ("mine.rewards.Router", "mine.rewards.Router"),
        ("EarlyStopping", "EarlyStopping"),
        ("", ""),
    ],
)
def test_a_name_or_a_path_from_before_a_move_leads_to_the_class(given: str, found: str):
    assert full_path(given) == found


def test_a_name_of_two_classes_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(class_names, "homes", lambda: {"Twice": ("frpo.a", "frpo.b")})
    with pytest.raises(ConfigError, match=r"'Twice', the name of 2 classes; write frpo\.a\.Twice or frpo\.b\.Twice"):
        full_path("Twice")
    assert full_path("frpo.b.Twice") == "frpo.b.Twice"


def test_a_tree_is_resolved_where_it_names_classes_and_nowhere_else():
    tree = {
        "reward": {"class_path": "Router", "init_args": {"routes": {"a": "frpo.rules.Caution"}}},
        "callbacks": [{"class_path": "Checkpoint"}, {"class_path": "mine.Checkpoint"}],
        "task": "Code",
        "count": 3,
    }
    assert with_full_paths(tree) == {
        "reward": {
            "class_path": "frpo.rewards.router.Router",
            "init_args": {"routes": {"a": "frpo.rewards.rules.Caution"}},
        },
        "callbacks": [{"class_path": "frpo.run.checkpoint.Checkpoint"}, {"class_path": "mine.Checkpoint"}],
        "task": "Code",
        "count": 3,
    }


def test_a_class_of_somebody_else_keeps_its_path():
    assert short_name("frpo.objectives.FRPO") == "FRPO"
    assert short_name("mine.objectives.FRPO") == "mine.objectives.FRPO"
