"""Writing a configuration down so that it can be changed: references between settings stay references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from frpo.foundation.class_names import with_full_paths
from frpo.foundation.yaml_files import load_text

# `frpo export` and other readers take the description of the policy from the file as it stands.
KEPT_PLAIN = ("model.init_args.policy",)


def restore_references(text: str, references: Mapping[str, str]) -> str:
    """Put ``${...}`` back where a setting was given as a reference to another one.

    ``text`` is a configuration in full, ``references`` the text first given by path. Without this the folder of a run
    would stand in its configuration a dozen times, and ``--output_dir`` given together with it would move only some of
    what the run writes. What refers to the environment stays filled in: the file says what was run. Classes of frpo are
    named by the module that defines them.
    """
    tree = with_full_paths(load_text(text, "the configuration"))
    for path, reference in references.items():
        if "${oc." not in reference and not path.startswith(KEPT_PLAIN):
            _replace(tree, path, reference)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _replace(tree: Any, path: str, value: str) -> None:
    """Set the value at ``path`` (``a.b[0].c``); a path that the configuration does not have is passed over."""
    *steps, last = path.replace("[", ".").replace("]", "").split(".")
    for step in steps:
        if not _has(tree, step):
            return
        tree = tree[int(step) if isinstance(tree, list) else step]
    if _has(tree, last):
        tree[int(last) if isinstance(tree, list) else last] = value


def _has(tree: Any, step: str) -> bool:
    if isinstance(tree, list):
        return step.isdigit() and int(step) < len(tree)
    return isinstance(tree, dict) and step in tree
