"""A study as data: which policies are trained, on what they are fine-tuned afterwards, and how all are measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from frpo.study.spelling import as_class

Tree = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: its values by label, and the settings (dotted paths) that take them."""

    name: str
    keys: tuple[str, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method or a downstream task before its grid is expanded.

    ``config`` are recipe files. ``settings`` are laid over them as a second ``--config`` of ``frpo fit`` would be: the
    settings of a class are added to the recipe's, a mapping by name (``routes``) replaces the recipe's. ``policy``
    describes a model that is taken as it is. ``start`` names the method whose policy a run starts from. ``compare:
    false`` makes a stage of others, a warm-up say, that is not fine-tuned itself.
    """

    name: str
    config: tuple[str, ...] = ()
    settings: Tree = field(default_factory=dict)
    policy: Tree | None = None
    start: str | None = None
    family: str = ""
    factors: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[Axis, ...] = ()
    compare: bool = True

    def points(self) -> Iterator[tuple[dict[str, Any], Tree]]:
        """Each point of the grid: its factors by name, and the settings they make."""
        for values in itertools.product(*(axis.values.items() for axis in self.grid)):
            factors, settings = dict(self.factors), self.settings
            for axis, (label, value) in zip(self.grid, values, strict=True):
                factors[axis.name] = value if str(value) == label else label
                for key in axis.keys:
                    settings = overlaid(settings, nested(key, value))
            yield factors, settings

    def label(self, factors: Mapping[str, Any]) -> str:
        """The name of a point: the entry's, and the values of its axes."""
        return ", ".join([self.name, *(f"{axis.name} {factors[axis.name]}" for axis in self.grid)])


@dataclass(frozen=True)
class StudySpec:
    """A study as written; :func:`frpo.study.reading.read_study` reads and checks it.

    ``suites`` measure policies as trained and all along their fine-tuning, those in ``policy_only`` the former alone.
    ``data_dir`` is what ``${data_dir}`` stands for in every run. ``threads`` are CPU threads a cell,
    ``keep_checkpoints`` keeps those of finished cells (their exported policies are always kept), ``tracking`` the
    settings of :class:`~frpo.run.tracker.MLflowTracker` or None.
    """

    name: str
    seeds: tuple[int, ...]
    methods: tuple[Entry, ...]
    downstream: tuple[Entry, ...]
    suites: Tree
    policy_only: tuple[str, ...]
    at_steps: tuple[int, ...]
    every_n_train_steps: int | None
    roles: Mapping[str, Any]
    tracking: Tree | None
    data_dir: str
    threads: int
    keep_checkpoints: bool


def nested(key: str, value: Any) -> Tree:
    """``{"a": {"b": value}}`` of the dotted ``a.b``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def overlaid(below: Tree, above: Tree) -> Tree:
    """``above`` laid over ``below``: mappings merge, everything else is replaced, a class with its settings.

    Both are spelled as :func:`frpo.study.spelling.flat` does.
    """
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, dict):
            under = as_class(under)
        if isinstance(under, dict) and isinstance(value, dict) and not _other_class(under, value):
            merged[key] = overlaid(under, value)
        else:
            merged[key] = value
    return merged


def _other_class(below: Tree, above: Tree) -> bool:
    return "class_path" in below and "class_path" in above and below["class_path"] != above["class_path"]
