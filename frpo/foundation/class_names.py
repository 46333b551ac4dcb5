"""frpo's own classes by name: ``class_path: FRPO`` stands for ``frpo.objectives.FRPO``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import frpo
from frpo.foundation.errors import ConfigError

OWN = "frpo."


@cache
def homes() -> Mapping[str, tuple[str, ...]]:
    """The modules that define each public class of frpo, by its name. They are read, not imported."""
    root = Path(frpo.__file__).parent
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join([root.name, *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for name in re.findall(r"^class ([A-Z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = (*found.get(name, ()), module)
    return found


def full_path(class_path: str) -> str:
    """The import path of a class of frpo; whatever names no class of frpo is returned as it is.

    ``class_path`` is its name, or any path into frpo that ends in it: files from before a move stay readable.

    Raises:
        ConfigError: several classes of frpo have the name.
    """
    module, _, name = class_path.rpartition(".")
    if module and not class_path.startswith(OWN):
        return class_path
    known = homes().get(name, ())
    if not known or module in known:
        return class_path
    if len(known) > 1:
        paths = " or ".join(f"{home}.{name}" for home in known)
        raise ConfigError(f"got {class_path!r}, the name of {len(known)} classes; write {paths}")
    return f"{known[0]}.{name}"


def short_name(class_path: str) -> str:
    """A class of frpo by its name alone; any other class by its path."""
    return class_path.rpartition(".")[2] if class_path.startswith(OWN) else class_path


def with_full_paths(tree: Any) -> Any:
    """``tree`` with the full path of frpo's classes after each ``class_path``, and for each old path into frpo."""
    if isinstance(tree, dict):
        return {
            key: full_path(value) if key == "class_path" and isinstance(value, str) else with_full_paths(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [with_full_paths(item) for item in tree]
    return full_path(tree) if isinstance(tree, str) and tree.startswith(OWN) else tree
