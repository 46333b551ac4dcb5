"""Where the configuration fragments and recipes that come with the package are."""

from __future__ import annotations

from pathlib import Path

import frpo

FOLDERS = ("conf", "recipes")


def shipped(folder: str) -> Path:
    """Return the folder ``conf`` or ``recipes``: inside an installed package, beside it in a checkout."""
    package = Path(frpo.__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find_shipped(path: str) -> Path | None:
    """Return the shipped file named by ``conf/...`` or ``recipes/...``, or None where ``path`` names none."""
    parts = Path(path).parts
    if len(parts) < 2 or parts[0] not in FOLDERS or ".." in parts:
        return None
    found = shipped(parts[0]).joinpath(*parts[1:])
    return found if found.is_file() else None
