"""One spelling for what a study merges and hashes; a recipe may be written with ``init_args`` or without."""

from __future__ import annotations

from typing import Any

from frpo.foundation.class_names import short_name

SPEC_KEYS = ("class_path", "dict_kwargs")


def flat(tree: Any) -> Any:
    """``tree`` as the command line spells it: settings where ``init_args`` stood, and frpo's classes by name alone."""
    if isinstance(tree, list):
        return [flat(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    settings = tree.get("init_args")
    nested = settings if isinstance(settings, dict) else {}
    found = {key: flat(value) for key, value in {**tree, **nested}.items() if key != "init_args" or not nested}
    if isinstance(found.get("class_path"), str):
        found["class_path"] = short_name(found["class_path"])
    return found


def flat_key(key: str) -> str:
    """A dotted setting as the command line spells it: ``model.objective.lam``."""
    return ".".join(name for name in key.split(".") if name != "init_args")


def spelled_out(tree: Any) -> Any:
    """``tree``, made by :func:`flat`, as the parser reads it: ``class_path`` and ``init_args``."""
    if isinstance(tree, list | tuple):
        return [spelled_out(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    found = {key: spelled_out(value) for key, value in tree.items()}
    if "class_path" not in found:
        return found
    settings = {key: found.pop(key) for key in list(found) if key not in SPEC_KEYS}
    return {**found, "init_args": settings} if settings else found


def as_class(described: Any) -> Any:
    """A class given by its name alone as a mapping, which settings can be laid over."""
    return {"class_path": short_name(described)} if isinstance(described, str) else described
