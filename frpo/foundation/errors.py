"""Errors of the command line: one short message, exit status 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A configuration or command line that cannot be run. The message is all the user sees."""


def nearest(name: str, options: Iterable[str], limit: int = 3) -> list[str]:
    """Return the options most like ``name``, best first, at most ``limit``."""
    return difflib.get_close_matches(name, sorted(set(map(str, options))), n=limit, cutoff=0.6)


def suggestion(name: str, options: Iterable[str]) -> str:
    """Return "; did you mean X?" for the options like ``name``, or what is valid where nothing is like it."""
    options = sorted(set(map(str, options)))
    close = nearest(name, options)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; valid here: {', '.join(options)}" if options else ""


def clipped(text: str, characters: int = 200) -> str:
    """``text``, cut where it is too long to be read in a message."""
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text)} characters)"
