"""Reading YAML configuration files: includes, duplicate keys, and errors that name file and line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frpo.foundation.errors import ConfigError, clipped, nearest
from frpo.foundation.shipped import FOLDERS, find_shipped, shipped

INCLUDE = "include"
MAX_DEPTH = 32  # of a document; what reads it afterwards takes many Python frames per level
# What PyYAML's constructors raise on `!!int x`, `!!bool x`, `!!timestamp x` or an integer of thousands of digits.
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


class UnreadableValueError(ConfigError):
    """Well-formed YAML that stands for no value of a configuration."""


class _Refused(yaml.constructor.ConstructorError):
    """Raised by the loader where :class:`UnreadableValueError` is meant."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, a date stays text, and a key stands once."""

    depth = 0
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        letter: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":float", ":timestamp"))]
        for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        f"first given in line {seen[key.value].line + 1}",
                        None,
                        f"the key {key.value!r} is given twice in one mapping",
                        key.start_mark,
                    )
                seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        str(value).encode()  # half of a surrogate pair can be escaped, and then be neither printed nor written
        return value

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH or node in self.recursive_objects:
            raise _refusal(f"nested deeper than {MAX_DEPTH} levels, or an alias within its own anchor", node)
        try:
            return super().construct_object(node, deep=True)
        except _UNREADABLE as error:
            kind = node.tag.rpartition(":")[2]
            shown = f"{node.value:.40}" if isinstance(node, yaml.ScalarNode) else "this"
            raise _refusal(
                f"{shown!r} cannot be read as {kind}; write another value, or text in quotes", node
            ) from error
        finally:
            self.depth -= 1


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _refusal(problem: str, node: yaml.Node) -> _Refused:
    return _Refused(None, None, problem, node.start_mark)


@dataclass(frozen=True)
class Document:
    """One configuration file as read, without its ``include`` list."""

    source: str
    tree: dict[str, Any]


def load_text(text: str, source: str) -> Any:
    """Parse YAML; what cannot be read becomes a :class:`ConfigError` that names ``source``, line and column.

    Only plain values are made, whatever the tags, nested at most :data:`MAX_DEPTH` levels.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}, line {line}: not valid YAML: the character {error.character!r} may not stand in it; write it "
            'as an escape within double quotes, "\\x00"'
        ) from error
    except RecursionError as error:
        raise UnreadableValueError(f"{source}: not valid YAML: nested deeper than {MAX_DEPTH} levels") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        context = f" ({error.context})" if error.context else ""
        kind = UnreadableValueError if isinstance(error, _Refused) else ConfigError
        raise kind(f"{where}: not valid YAML: {error.problem}{context}") from error


def read_with_includes(path: str) -> list[Document]:
    """Return the documents of a configuration file: what it includes, in order and recursively, then itself.

    ``path`` is looked up in the working directory first, then among the shipped ``conf/`` and ``recipes/``.
    """
    return _expand(find_file(path, None), ())


def _expand(path: Path, chain: tuple[Path, ...]) -> list[Document]:
    path = path.resolve()
    if path in chain:
        names = " -> ".join(_shown(link) for link in (*chain[chain.index(path) :], path))
        raise ConfigError(f"include goes round in a circle: {names}; remove one of these lines")
    tree = read_mapping(path)
    included = include_list(tree.pop(INCLUDE, None), path)
    documents = [document for entry in included for document in _expand(find_file(entry, path), (*chain, path))]
    return [*documents, Document(_shown(path), tree)]


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping a YAML file holds; an empty file is an empty mapping."""
    source = _shown(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{source}: cannot be read as text: {error}") from error
    tree = load_text(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: got a {type(tree).__name__} at the top level, expected 'key: value' lines such as 'trainer:'"
        )
    return tree


def include_list(value: Any, path: Path) -> list[str]:
    """Check the value of ``include``: a list of paths."""
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        got = clipped(repr(value))
        raise ConfigError(f"{_shown(path)}: include: got {got}, expected a list of paths, [conf/trainer/cpu.yaml]")
    return entries


def find_file(name: str, including: Path | None) -> Path:
    """Return the file called ``name`` by the file ``including``, or on the command line where that is None."""
    beside = (including.parent if including else Path()) / name
    said_by = f"{_shown(including)}: include: " if including else "--config: "
    try:
        found = beside if beside.is_file() else find_shipped(name)
    except (OSError, ValueError) as error:  # a name of thousands of characters, a folder that may not be entered
        raise ConfigError(f"{said_by}{clipped(name)} cannot be opened: {clipped(str(error))}") from error
    if found:
        return found
    if "\0" in name:
        raise ConfigError(f"{said_by}{clipped(name)!r} is no file name: it holds a NUL character")
    if beside.is_dir():
        raise ConfigError(f"{said_by}{name} is a folder, expected a YAML file")
    shipped_names = [
        str(file.relative_to(shipped(root).parent)) for root in FOLDERS for file in shipped(root).rglob("*.yaml")
    ]
    neighbours = [str(Path(name).with_name(file.name)) for file in beside.parent.glob("*.y*ml")]
    close = nearest(name, [*neighbours, *shipped_names], limit=2)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(f"{said_by}no file {name}, neither at {beside.absolute()} nor among the files of frpo{hint}")
