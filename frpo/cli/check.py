"""Reading a configuration the way the parser will, to say what is wrong with it in the user's words.

What jsonargparse says of a mistake is long and names no neighbour, and some mistakes it takes in silence: an unknown
key with an empty mapping, ``???``, settings lost when a class is swapped. The checker walks every layer (file by file,
then option by option) along the constructors' signatures.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from frpo.cli.arguments import Arguments
from frpo.cli.hints import (
    REQUIRED,
    Field,
    class_of,
    describe,
    element_of,
    fields,
    fits,
    import_class,
    is_plain,
    values_of,
)
from frpo.foundation.class_names import full_path
from frpo.foundation.errors import ConfigError, clipped, nearest, suggestion
from frpo.foundation.redaction import redact

COMMAND_LINE = "command line"
SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class Group:
    """Settings under one key without a ``class_path``; ``reserved`` says of a key why it is not for configurations."""

    accepts: dict[str, Field]
    reserved: dict[str, str]


@dataclass
class Chosen:
    """The class chosen at one path so far, what it accepts (None: anything), and which settings were given.

    ``prefix`` is the path of its settings: ``path.init_args``, or ``path`` itself where they stand in ``short`` form.
    """

    class_path: str
    target: Callable[..., Any]
    accepts: dict[str, Field] | None
    prefix: str
    short: bool = False
    given: set[str] = field(default_factory=set)


@dataclass
class Findings:
    """What the walk found. ``refused`` stops the run; ``explained`` only words a failure of the parser."""

    refused: list[str] = field(default_factory=list)
    explained: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)


class Checker:
    """Walks the layers of a configuration in the order they apply.

    ``top`` holds the top-level keys, ``defaults`` the class that stands at a path before the first layer. Afterwards
    ``references`` holds what was given with a ``${...}`` in it, by path.
    """

    def __init__(self, top: dict[str, Field], defaults: dict[str, Callable[..., Any]]) -> None:
        self.top = top
        self.findings = Findings()
        self.references = {name: top[name].default for name in top if "${" in str(top[name].default)}
        self.source = ""
        self.typed: Any = None
        self.parts: dict[str, set[str]] = {}
        self.chosen = {
            path: Chosen(f"{cls.__module__}.{cls.__qualname__}", cls, fields(cls), f"{path}.init_args")
            for path, cls in defaults.items()
        }

    def check(self, arguments: Arguments) -> Findings:
        """Walk all layers of ``arguments`` and return what was found."""
        for document in arguments.documents:
            self._layer(document.source, document.tree)
        for option in arguments.options:
            tree: Any = option.value
            for name in reversed(option.names):
                tree = {name: tree}
            self.typed = option.value
            self._layer(COMMAND_LINE, tree)
        for chosen in self.chosen.values():
            for name, accepted in (chosen.accepts or {}).items():
                if accepted.default is REQUIRED and name not in chosen.given:
                    self.findings.explained.append(
                        f"{chosen.prefix}.{name}: required by {chosen.class_path}, got nothing; "
                        f"expected {describe(accepted.hint)}"
                    )
        return self.findings

    def _layer(self, source: str, tree: dict[str, Any]) -> None:
        self.source = source
        self._settings(tree, self.top, "")

    def _say(self, findings: list[str], path: str, text: str) -> None:
        where = "" if self.source == COMMAND_LINE else f"{self.source}: "
        findings.append(f"{where}{path}: {text}")

    def _settings(self, tree: dict[Any, Any], accepts: dict[str, Field], prefix: str, skip: Iterable[str] = ()) -> None:
        for key in [key for key in tree if key not in skip]:
            name = str(key).removesuffix("+")
            path = f"{prefix}.{name}" if prefix else name
            if name in accepts:
                tree[key] = self._value(tree[key], accepts[name], path)
            else:
                self._say(self.findings.refused, path, f"unknown key{self._nearby(name, accepts, prefix)}")

    def _nearby(self, name: str, accepts: dict[str, Field], prefix: str) -> str:
        close = [f"{prefix}.{option}" if prefix else option for option in nearest(name, accepts)]
        if not close:
            close = [known for known in self._known() if known.rsplit(".", 1)[-1] == name]
        return f"; did you mean {' or '.join(close)}?" if close else suggestion(name, accepts)

    def _known(self) -> Iterable[str]:
        for chosen in self.chosen.values():
            yield from (f"{chosen.prefix}.{name}" for name in chosen.accepts or ())
        for path, top in self.top.items():
            if isinstance(top.hint, Group):
                yield from (f"{path}.{name}" for name in top.hint.accepts)

    def _value(self, value: Any, accepted: Field, path: str) -> Any:
        """Look at one value; returns it as the parser is to get it: a class by its path."""
        hint = accepted.hint
        self.references.pop(path, None)
        if isinstance(value, str) and value.strip() == "???":
            self._say(self.findings.refused, path, "'???' marks a value you must give; write it here")
        elif isinstance(value, str) and "${" in value:
            self.references[path] = value
        elif isinstance(hint, Group):
            self._group(value, hint, path)
        elif isinstance(value, dict) and "class_path" not in value and values_of(hint) is not None:
            self._mapping(value, path)
            for key, item in value.items():
                value[key] = self._value(item, Field(values_of(hint), REQUIRED), f"{path}.{key}")
        elif isinstance(value, list) and element_of(hint) is not None:
            self._forget(f"{path}[")
            for index, item in enumerate(value):
                value[index] = self._value(item, Field(element_of(hint), REQUIRED), f"{path}[{index}]")
        elif class_of(hint) and (isinstance(value, dict) or not is_plain(value, hint)):
            spec = {"class_path": full_path(value)} if isinstance(value, str) else value
            self._class(spec, accepted, path)
            return spec["class_path"] if isinstance(value, str) else value
        else:
            self._forget(path)
            if not fits(value, hint, as_option=self.source == COMMAND_LINE):
                self._say(
                    self.findings.explained,
                    path,
                    f"got {clipped(repr(redact(value, path)))}, expected {describe(hint)}",
                )
        return value

    def _mapping(self, value: dict[str, Any], path: str) -> None:
        """Warn where a mapping by name replaces one given before; an option for one of its names adds to it."""
        whole = self.source != COMMAND_LINE or value is self.typed
        before = self.parts.get(path, set())
        dropped = sorted(before - set(value)) if whole else []
        self.parts[path] = set(value) if whole else before | set(value)
        for name in dropped:
            self._forget(f"{path}.{name}")
        if dropped:
            self.findings.warned.append(
                f"{path}: {self.source} replaces the mapping: dropped {', '.join(dropped)}; repeat what is to stay"
            )

    def _group(self, value: Any, group: Group, path: str) -> None:
        if not isinstance(value, dict):
            example = f"{path}: {{{next(iter(group.accepts))}: ...}}"
            self._say(
                self.findings.refused, path, f"got {clipped(repr(redact(value, path)))}, expected settings, {example}"
            )
            return
        for name, reason in group.reserved.items():
            if name in value:
                self._say(self.findings.refused, f"{path}.{name}", reason)
        self._settings(value, group.accepts, path, skip=group.reserved)

    def _class(self, spec: dict[str, Any], accepted: Field, path: str) -> None:
        earlier = self.chosen.get(path)
        named = self._named_class(spec, accepted, path)
        if named is None:
            return
        class_path, target = named
        found = class_of(accepted.hint)
        assert found is not None, "only called for hints that name a class"
        explicit = "class_path" in spec or "init_args" in spec
        short = not explicit and (dataclasses.is_dataclass(target) if earlier is None else earlier.short)
        chosen = Chosen(class_path, target, fields(target, found[1]), path if short else f"{path}.init_args", short)
        if earlier is not None and earlier.target is not target:
            self._swapped(earlier, chosen, path)
        elif earlier is not None:
            chosen.given = earlier.given
        self.chosen[path] = chosen
        if "class_path" in spec:  # it is described anew, its mappings too
            self.parts = {known: names for known, names in self.parts.items() if not known.startswith(f"{path}.")}
        self._init_args(spec, chosen, path)

    def _named_class(self, spec: dict[str, Any], accepted: Field, path: str) -> tuple[str, Callable[..., Any]] | None:
        """The class a value is for: the one it names, else the one chosen before, the default's, or the base class."""
        found = class_of(accepted.hint)
        assert found is not None, "only called for hints that name a class"
        base, earlier, class_path = found[0], self.chosen.get(path), spec.get("class_path")
        if isinstance(class_path, str) and "${" not in class_path:
            try:
                return class_path, import_class(class_path, base)
            except ConfigError as error:
                self._say(self.findings.explained, f"{path}.class_path", str(error))
                return None
        if class_path is not None:
            return None
        if earlier is not None:
            return earlier.class_path, earlier.target
        default = accepted.default if inspect.isclass(accepted.default) else type(accepted.default)
        target = default if issubclass(default, base) else base
        if inspect.isabstract(target):
            self._say(self.findings.explained, path, f"no class_path is given, expected one of {base.__name__}")
            return None
        return f"{target.__module__}.{target.__qualname__}", target

    def _init_args(self, spec: dict[str, Any], chosen: Chosen, path: str) -> None:
        settings = {} if chosen.short else spec.get("init_args", {})
        if not isinstance(settings, dict):
            expected = f"the settings of {chosen.class_path} by name"
            self._say(self.findings.refused, chosen.prefix, f"got {clipped(repr(settings))}, expected {expected}")
            return
        beside = [key for key in spec if key not in SPEC_KEYS]
        if ("class_path" in spec or "init_args" in spec) and self.source != COMMAND_LINE:
            for key in beside:
                text = f"stands beside class_path; write {chosen.prefix}.{key}"
                self._say(self.findings.explained, f"{path}.{key}", text)
        chosen.given |= {str(key).removesuffix("+") for key in (*settings, *beside)}
        if chosen.accepts is not None:
            self._settings(settings, chosen.accepts, chosen.prefix)
            self._settings(spec, chosen.accepts, chosen.prefix, skip=SPEC_KEYS)

    def _swapped(self, earlier: Chosen, chosen: Chosen, path: str) -> None:
        kept = earlier.given if chosen.accepts is None else earlier.given & set(chosen.accepts)
        dropped = sorted(earlier.given - kept)
        chosen.given = set(kept)
        for name in dropped:
            self._forget(f"{earlier.prefix}.{name}")
        if earlier.given:
            parts = [f"dropped {', '.join(dropped)}"] if dropped else []
            parts += [f"kept {', '.join(sorted(kept))} as set before"] if kept else []
            self.findings.warned.append(
                f"{path}: {self.source} changes the class from {earlier.class_path} to {chosen.class_path}: "
                + "; ".join(parts)
            )

    def _forget(self, prefix: str) -> None:
        """Drop what is known of settings below ``prefix``, which a new value replaces."""
        for known in (self.chosen, self.references):
            for path in [path for path in known if path.startswith(prefix)]:
                if path == prefix or path[len(prefix)] in ".[" or prefix.endswith("["):
                    known.pop(path)
