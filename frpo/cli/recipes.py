"""``frpo recipes``: list, show and copy the complete runs that come with the package."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from frpo.foundation.errors import ConfigError, suggestion
from frpo.foundation.shipped import shipped
from frpo.foundation.yaml_files import INCLUDE, find_file

USAGE = """usage: frpo recipes ls | show NAME | cp NAME DEST

  ls            the recipes that come with frpo, one a line
  show NAME     print a recipe
  cp NAME DEST  copy a recipe to the file or folder DEST, to be changed there

Run one by the command that its header gives: `frpo fit --config recipes/NAME.yaml`, or for a study
`frpo study run recipes/studies/NAME.yaml`."""


def main(args: list[str]) -> int:
    """Run ``frpo recipes`` and return its exit status."""
    actions: dict[str, tuple[int, Callable[..., None]]] = {"ls": (0, list_all), "show": (1, show), "cp": (2, copy)}
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not args or args[0] not in actions:
        raise ConfigError(f"recipes: got {args[0]!r}{suggestion(args[0], actions)}" if args else USAGE)
    count, action = actions[args[0]]
    if len(args) - 1 != count:
        raise ConfigError(f"recipes {args[0]}: got {len(args) - 1} arguments, expected {count}\n{USAGE}")
    try:
        action(*args[1:])
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def names() -> list[str]:
    """The recipes by name: the path below ``recipes/`` without ``.yaml``."""
    root = shipped("recipes")
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml"))


def list_all() -> None:
    """Print each recipe's name and the first line of its header."""
    width = max(map(len, names()))
    for name in names():
        first = _file(name).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.lstrip('# ')}")


def show(name: str) -> None:
    """Print a recipe."""
    print(_file(name).read_text(encoding="utf-8"), end="")


def copy(name: str, dest: str) -> None:
    """Copy a recipe; what it includes from beside itself is named so that it is found from anywhere."""
    source, target = _file(name), Path(dest)
    if target.is_dir() or dest.endswith(os.sep):
        target = target / source.name
    if target.exists():
        raise ConfigError(f"recipes cp: {target} exists; choose another name, or remove it first")
    text = source.read_text(encoding="utf-8")
    for start, end, entry in reversed(list(_includes(text))):
        found = find_file(entry, source).resolve().relative_to(shipped("recipes").parent.resolve())
        text = text[:start] + found.as_posix() + text[end:]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    launch = re.search(r"^# Launch: +(frpo .*)$", text, re.MULTILINE)
    run = f", then run `{launch[1].replace(f'recipes/{_plain(name)}.yaml', str(target))}`" if launch else ""
    print(f"{target}: change it{run}")


def _file(name: str) -> Path:
    known = names()
    plain = _plain(name)
    if plain not in known:
        raise ConfigError(f"no recipe {name!r}{suggestion(plain, known)}")
    return shipped("recipes") / f"{plain}.yaml"


def _plain(name: str) -> str:
    return name.removeprefix("recipes/").removesuffix(".yaml")


def _includes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield where each entry of ``include`` stands in ``text``, so that comments survive the change."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in document.value if isinstance(document, yaml.MappingNode) else ():
        if key.value == INCLUDE and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                yield entry.start_mark.index, entry.end_mark.index, entry.value
