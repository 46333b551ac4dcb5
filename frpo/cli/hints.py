"""What a constructor accepts, read from its signature: the part of a type hint a configuration value goes to."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import importlib
import inspect
import os
import pkgutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

from jsonargparse import ArgumentParser

from frpo.foundation.class_names import full_path, short_name
from frpo.foundation.errors import ConfigError, clipped, nearest
from frpo.foundation.yaml_files import load_text

_PLAIN = (Any, int, float, complex, str, bytes, bool, list, dict, tuple, set, frozenset, type(None), object)
_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
MAX_CHOICES = 12
REQUIRED = inspect.Parameter.empty
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@dataclass(frozen=True)
class Field:
    """One parameter of a constructor: ``hint`` is ``Any`` where it has no type, ``default`` REQUIRED without one."""

    hint: Any
    default: Any


def fields(target: Callable[..., Any], skip: int = 0) -> dict[str, Field] | None:
    """Return the parameters of a class or function by name, or None where it takes arbitrary keywords.

    ``skip`` positional parameters are left out: a configured callable is given those by its caller.
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())[skip:]
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    hints = _type_hints(target)
    return {
        parameter.name: Field(hints.get(parameter.name, Any), parameter.default)
        for parameter in parameters
        if parameter.kind is not parameter.VAR_POSITIONAL
    }


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    is_class = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    inspected: Any = inspect.getattr_static(target, "__init__") if is_class else target
    try:
        return typing.get_type_hints(inspected)
    except (NameError, TypeError):  # a name imported for type checkers alone: parameters stay known, types do not
        return {}


def members(hint: Any) -> list[Any]:
    """Return the alternatives of a type hint: the members of a union, or the hint itself."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return members(typing.get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in typing.get_args(hint) for member in members(argument)]
    return [hint]


def class_of(hint: Any) -> tuple[type, int] | None:
    """Return the class a ``class_path`` must name for ``hint`` and the positional parameters its caller fills."""
    for member in members(hint):
        if _is_configurable(member):
            return member, 0
        if typing.get_origin(member) is collections.abc.Callable:
            given, returned = typing.get_args(member)
            for result in members(returned):
                if _is_configurable(result):
                    return result, len(given) if isinstance(given, list) else 0
    return None


def _is_configurable(hint: Any) -> bool:
    if typing.get_origin(hint) is not None or not inspect.isclass(hint) or hint in _PLAIN:
        return False
    return not issubclass(hint, enum.Enum | os.PathLike)


def element_of(hint: Any) -> Any:
    """Return the hint of the elements where ``hint`` allows a list, else None."""
    return next(
        ((typing.get_args(m) or (Any,))[0] for m in members(hint) if (typing.get_origin(m) or m) in _LISTS), None
    )


def values_of(hint: Any) -> Any:
    """Return the hint of the values where ``hint`` allows a mapping, else None."""
    return next(
        ((typing.get_args(m) or (Any, Any))[1] for m in members(hint) if (typing.get_origin(m) or m) in _MAPPINGS),
        None,
    )


def import_class(class_path: str, base: type) -> Callable[..., Any]:
    """Import what ``class_path`` names and check it against ``base``; raise :class:`ConfigError` with the nearest.

    A name without a dot is that of a class of frpo, else of a subclass of ``base`` imported so far.
    """
    class_path = full_path(class_path)
    if "." not in class_path:
        short = [cls for cls in _subclasses(base) if cls.__name__ == class_path]
        if short:
            return short[0]
        raise ConfigError(f"no {base.__name__} is called {class_path!r}{_alike(class_path, base)}")
    module_name, name = class_path.rsplit(".", 1)
    if not all(part.isidentifier() for part in class_path.split(".")):
        raise ConfigError(f"got {clipped(class_path)!r}, expected the import path of a class: names joined by dots")
    target = getattr(_import_module(module_name, class_path, base), name, None)
    if target is None:
        raise ConfigError(f"module {module_name} has no {name!r}{_alike(class_path, base)}")
    if inspect.isclass(target) and not issubclass(target, base):
        raise ConfigError(f"{class_path} is no {base.__name__}{_alike(class_path, base)}")
    if inspect.isabstract(target):
        raise ConfigError(f"{class_path} is abstract{_alike(class_path, base)}")
    if not callable(target):
        raise ConfigError(f"{class_path} is a {type(target).__name__}, expected a class")
    if not inspect.isclass(target) and not _returns(target, base):
        raise ConfigError(
            f"{class_path} is no {base.__name__}, nor a function said to return one{_alike(class_path, base)}"
        )
    return target


def _returns(function: Callable[..., Any], base: type) -> bool:
    """Whether a function's return annotation is ``base`` or a subclass; any other is never called."""
    returned = _type_hints(function).get("return")
    return inspect.isclass(returned) and issubclass(returned, base)


def _import_module(module_name: str, class_path: str, base: type) -> types.ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise ConfigError(f"no module {missing!r} for {class_path}{_alike(class_path, base)}") from error
        raise ConfigError(f"{class_path} needs the package {missing!r}, which is not installed") from error
    except Exception as error:  # what a module raises while it is imported is its author's choice
        raise ConfigError(f"{class_path}: importing {module_name} fails: {type(error).__name__}: {error}") from error


def _subclasses(base: type[Any]) -> list[type[Any]]:
    found: dict[type[Any], None] = {base: None}
    queue: list[type[Any]] = [base]
    while queue:
        for cls in queue.pop().__subclasses__():
            if cls not in found:
                found[cls] = None
                queue.append(cls)
    return [cls for cls in found if not inspect.isabstract(cls)]


def _alike(class_path: str, base: type) -> str:
    _import_neighbours(base)
    paths = [f"{cls.__module__}.{cls.__qualname__}" for cls in _subclasses(base)]
    known = sorted(short_name(path) for path in paths if "._" not in path and path != class_path)
    name = class_path.rsplit(".", 1)[-1]
    same_name = [path for path in known if path.rsplit(".", 1)[-1] == name]
    similar = {path.rsplit(".", 1)[-1]: path for path in known}
    close = same_name or [similar[short] for short in nearest(name, similar)] or nearest(class_path, known)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; choose from {', '.join(known)}" if 0 < len(known) <= MAX_CHOICES else ""


def _import_neighbours(base: type) -> None:
    """Import the modules beside one of our base classes, so that its subclasses can be suggested."""
    package = base.__module__.rpartition(".")[0]
    if not package.startswith("frpo."):
        return
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        with contextlib.suppress(ModuleNotFoundError):  # an optional dependency: its classes are not suggested
            importlib.import_module(module.name)


def is_plain(value: Any, hint: Any) -> bool:
    """Whether ``value`` names no class: it is no text, or text that ``hint`` takes as it is."""
    if not isinstance(value, str):
        return True
    alternatives = members(hint)
    if str in alternatives or any(typing.get_origin(member) is typing.Literal for member in alternatives):
        return True
    try:
        return not isinstance(load_text(value, "the value"), str)
    except ConfigError:  # no YAML, so it is the text as it stands
        return False


def fits(value: Any, hint: Any, as_option: bool) -> bool:
    """Whether the parser takes ``value`` for ``hint``; ``as_option`` where it was typed on the command line."""
    if hint is Any or "${" in str(value):
        return True
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except (ValueError, TypeError):  # a type no configuration can express: left to the parser
        return True
    try:
        if as_option and isinstance(value, str):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except Exception:  # mostly ArgumentError, but its YAML reader lets others through
        return False
    return True


def describe(hint: Any) -> str:
    """Name a type hint for a message: ``float or null``, ``one of a, b``, ``Reward (class_path, init_args)``."""
    alternatives = members(hint)
    choices = [choice for m in alternatives if typing.get_origin(m) is typing.Literal for choice in typing.get_args(m)]
    names = [f"one of {', '.join(dict.fromkeys(map(str, choices)))}"] if choices else []
    names += [_describe_one(m) for m in alternatives if typing.get_origin(m) is not typing.Literal]
    return " or ".join(dict.fromkeys(names))


def _describe_one(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if (origin or hint) in _MAPPINGS:
        return f"a mapping to {describe(arguments[1])}" if arguments else "a mapping"
    if (origin or hint) in _LISTS:
        return f"a list of {describe(arguments[0])}" if arguments else "a list"
    found = class_of(hint)
    if found:
        return f"{found[0].__name__} (class_path, init_args)"
    return getattr(hint, "__name__", str(hint))
