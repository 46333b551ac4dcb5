"""Splitting a command line into configuration files, overriding options and flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from frpo.foundation.class_names import full_path, with_full_paths
from frpo.foundation.errors import ConfigError
from frpo.foundation.yaml_files import INCLUDE, Document, UnreadableValueError, load_text, read_with_includes

CONFIG_FLAGS = ("--config", "-c")
HELP_FLAGS = ("--help", "-h")
PRINT_FLAG = "--print_config"
CLASSES = ("model", "data")
"""Settings that are an object each, of a class chosen by ``class_path``."""


@dataclass(frozen=True)
class Option:
    """``--key value`` on the command line. ``value`` is a mapping or list where the text reads as one, else text."""

    key: str
    text: str
    value: Any

    @property
    def names(self) -> list[str]:
        """The parts of the dotted key, without the ``+`` that appends to a list."""
        return self.key.removesuffix("+").split(".")


@dataclass
class Arguments:
    """A command line taken apart: documents in the order they apply, then options, then what asks for help."""

    documents: list[Document] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    help: list[str] = field(default_factory=list)
    print_config: bool = False

    def last_class(self, key: str) -> str | None:
        """Return the last ``class_path`` given for a top-level ``key``, or None."""
        values = [document.tree.get(key) for document in self.documents]
        values += [option.value for option in self.options if option.key in (key, f"{key}.class_path")]
        paths = [value.get("class_path") if isinstance(value, dict) else value for value in values]
        return next((path for path in reversed(paths) if isinstance(path, str) and "${" not in path), None)

    def words(self, folder: Path) -> list[str]:
        """The command line for the parser: documents as files in ``folder``, options, requests for help."""
        files = []
        for number, document in enumerate(self.documents):
            file = folder / f"{number}.yaml"
            file.write_text(yaml.safe_dump(document.tree, sort_keys=False), encoding="utf-8")
            files.append(f"--config={file}")
        return [*files, *map(_word, self.options), *self.help]


def split_arguments(args: Sequence[str]) -> Arguments:
    """Take a command line apart. Files apply before options wherever they stand: the command line overrides all."""
    found = Arguments()
    words = list(args)
    while words:
        word = words.pop(0)
        if word == PRINT_FLAG:
            found.print_config = True
            continue
        name, separator, text = word.partition("=")
        if name in HELP_FLAGS:
            found.help.append(word)
            continue
        if name.endswith(".help"):  # with or without the class to explain
            if not separator and words and not words[0].startswith("-"):
                text = words.pop(0)
            found.help.append(f"{name}={full_path(text)}" if text else name)
            continue
        if not separator:
            text = _value_of(name, words)
        if name in CONFIG_FLAGS or name == f"--{INCLUDE}":
            found.documents += [
                replace(document, tree=with_full_paths(document.tree)) for document in read_with_includes(text)
            ]
        elif name.startswith("--"):
            found.options.append(_option(name[2:], text))
        else:
            raise ConfigError(f"got {word!r} on the command line, expected --key value or --config FILE")
    return found


def _word(option: Option) -> str:
    first, *inner = option.names
    if option.text not in ("null", "~") or first not in CLASSES or not inner:
        return f"--{option.key}={option.text}"
    # jsonargparse hands a null to a class's setting as the text "None"; within a mapping it stays what it is.
    mapping = "null"
    for name in reversed(inner):
        mapping = f"{{{name}: {mapping}}}"
    return f"--{first}={mapping}"


def _value_of(name: str, words: list[str]) -> str:
    if not name.startswith("-"):
        raise ConfigError(f"got {name!r} on the command line, expected --key value or --config FILE")
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{name} needs a value: {name} VALUE")
    return words.pop(0)


def _option(key: str, text: str) -> Option:
    given = _structured(text, f"--{key}")
    value = full_path(given) if key.endswith("class_path") and isinstance(given, str) else with_full_paths(given)
    if value != given:
        text = value if isinstance(value, str) else json.dumps(value)
    return Option(key, text, value)


def _structured(text: str, name: str) -> Any:
    structured = text.lstrip().startswith(("{", "["))
    try:
        value = load_text(text, name)
    except UnreadableValueError:  # also of what does not look structured: the parser would read it, and fail
        raise
    except ConfigError:
        if structured:
            raise
        return text
    return value if structured and isinstance(value, dict | list) else text
