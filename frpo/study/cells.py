"""The cells of a study: one run each, named by what it depends on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import frpo
from frpo.foundation.errors import ConfigError
from frpo.foundation.yaml_files import read_with_includes
from frpo.study.factors import checked_factors
from frpo.study.spec import Entry, StudySpec, Tree, nested, overlaid
from frpo.study.spelling import flat

ADDRESS_DIGITS = 12
MAX_CELLS = 100_000
POLICY_FOLDER = "policy"
DONE = "done.json"
FAILED = "failed.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Cell:
    """One run: a policy that is trained (or taken as it is), exported and measured, or a downstream fine-tuning of one.

    ``address`` is a hash of all that the result depends on: the settings, the seed, the suites, the version of frpo and
    the address of the policy it starts from. The content of data files is not part of it. ``layers`` are the
    configuration, each laid over the one before, spelled by :func:`frpo.study.spelling.flat`. ``parent`` and
    ``reference`` are ids of the policy cells that this one starts from, and whose policy is the parent's reference.
    """

    id: str
    address: str
    kind: Literal["policy", "downstream"]
    method: str
    family: str
    seed: int
    task: str = ""
    factors: Mapping[str, Any] = field(default_factory=dict)
    downstream: Mapping[str, Any] = field(default_factory=dict)
    compare: bool = True
    parent: str | None = None
    reference: str | None = None
    policy: Tree | None = None
    layers: tuple[Tree, ...] = ()

    def merged(self) -> Tree:
        """The configuration of the run with its layers laid over each other."""
        tree: Tree = {}
        for layer in self.layers:
            tree = overlaid(tree, layer)
        return tree

    @property
    def trusts_remote_code(self) -> bool:
        """Whether its policy may run code that comes with the weights."""
        policy = self.policy or self.merged()["model"]["policy"]
        return bool(policy.get("trust_remote_code", False))

    @property
    def title(self) -> str:
        """What the cell is, in words."""
        after = "" if self.kind == "policy" else f" -> {', '.join([self.task, *_words(self.downstream)])}"
        return f"{self.method}, seed {self.seed}{after}"


def expand(spec: StudySpec) -> list[Cell]:
    """Every cell of a study, a policy before what starts from it; seeds in order."""
    _check_number(spec)
    documents = _Documents()
    cells: list[Cell] = []
    for seed in spec.seeds:
        trained: dict[str, Cell] = {}
        for entry in spec.methods:
            start = None if entry.start is None else trained[entry.start]
            for factors, settings in entry.points():
                cell = _policy_cell(spec, entry, factors, settings, seed, start, documents)
                trained[entry.name] = cell
                cells.append(cell)
                if entry.compare:
                    cells += _downstream_cells(spec, cell, documents)
    twice = [name for name, number in Counter(cell.id for cell in cells).items() if number > 1]
    if twice:
        raise ConfigError(
            f"study {spec.name}: two cells are both {twice[0]}: entries with the same settings need names that "
            "differ in more than punctuation, and no entry is needed twice"
        )
    return cells


def _check_number(spec: StudySpec) -> None:
    """Count the cells before making them: a grid of a few lines can stand for billions."""
    points = {entry.name: math.prod(len(axis.values) for axis in entry.grid) for entry in spec.downstream}
    policies = sum(
        math.prod(len(axis.values) for axis in entry.grid) * (1 + sum(points.values()) * entry.compare)
        for entry in spec.methods
    )
    if len(spec.seeds) * policies > MAX_CELLS:
        raise ConfigError(
            f"study {spec.name}: its seeds and grids make {len(spec.seeds) * policies} cells, expected at most "
            f"{MAX_CELLS}; leave out values of the largest grid"
        )


class _Documents:
    """The trees of recipes and of what they include, each read once."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Tree, ...]] = {}

    def __call__(self, files: tuple[str, ...]) -> tuple[Tree, ...]:
        for file in files:
            if file not in self._read:
                self._read[file] = tuple(flat(document.tree) for document in read_with_includes(file))
        return tuple(tree for file in files for tree in self._read[file])


def _policy_cell(
    spec: StudySpec,
    entry: Entry,
    factors: dict[str, Any],
    settings: Tree,
    seed: int,
    start: Cell | None,
    documents: _Documents,
) -> Cell:
    trains = start is not None and bool(entry.config)
    layers = (*documents(entry.config), overlaid(settings, _started_from("${study.start}", seed))) if trains else ()
    content = {
        "policy": _with_seed(entry.policy, seed),
        "layers": [_with_seed(layer, seed) for layer in layers],
        "suites": spec.suites,
        "seed": seed,
        "parent": start.address if start else None,
    }
    method = entry.label(factors)
    address = _address(content)
    cell = Cell(
        id=_id("policy", method, seed, "", address),
        address=address,
        kind="policy",
        method=method,
        family=entry.family,
        seed=seed,
        compare=entry.compare,
        parent=start.id if start else None,
        policy=content["policy"],
        layers=tuple(content["layers"]),
    )
    return replace(cell, factors=checked_factors(factors, cell.merged(), f"methods.{entry.name}"))


def _downstream_cells(spec: StudySpec, policy: Cell, documents: _Documents) -> list[Cell]:
    cells = []
    for entry in spec.downstream:
        for factors, settings in entry.points():
            layers = [
                _with_seed(layer, policy.seed)
                for layer in (
                    *documents(entry.config),
                    overlaid(settings, _started_from("${study.start}", policy.seed)),
                    _evaluated(spec),
                )
            ]
            address = _address({"layers": layers, "seed": policy.seed, "parent": policy.address})
            cells.append(
                Cell(
                    id=_id("downstream", policy.method, policy.seed, " ".join([entry.name, *_words(factors)]), address),
                    address=address,
                    kind="downstream",
                    method=policy.method,
                    family=policy.family,
                    seed=policy.seed,
                    task=entry.name,
                    factors=policy.factors,
                    downstream=factors,
                    parent=policy.id,
                    reference=policy.parent or policy.id,
                    layers=tuple(layers),
                )
            )
    return cells


def _started_from(path: str, seed: int) -> Tree:
    return {"seed_everything": seed, **nested("model.policy", {"class_path": "Policy", "path": path})}


def _evaluated(spec: StudySpec) -> Tree:
    suites = {name: suite for name, suite in spec.suites.items() if name not in spec.policy_only}
    settings: Tree = {"suites": suites, "at_start": False}
    if spec.at_steps:
        settings["at_steps"] = list(spec.at_steps)
    if spec.every_n_train_steps is not None:
        settings["every_n_train_steps"] = spec.every_n_train_steps
    return {"evaluation": settings}


def replaced(tree: Any, names: Mapping[str, str]) -> Any:
    """``tree`` with each ``${study.NAME}`` in its strings replaced by the value of ``names``."""
    if isinstance(tree, dict):
        return {key: replaced(value, names) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replaced(value, names) for value in tree]
    if not isinstance(tree, str) or "${study." not in tree:
        return tree
    if tree == "${study.seed}" and "seed" in names:
        return int(names["seed"])
    return re.sub(r"\$\{study\.(\w+)\}", lambda match: names.get(match[1], match[0]), tree)


def _with_seed(tree: Any, seed: int) -> Any:
    return replaced(tree, {"seed": str(seed)})


def _address(content: Tree) -> str:
    text = json.dumps({"frpo": frpo.__version__, **content}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:ADDRESS_DIGITS]


def _id(kind: str, method: str, seed: int, task: str, address: str) -> str:
    words = re.sub(r"[^a-z0-9.]+", "-", f"{method} {task}".lower()).strip("-")[:60]
    return f"{kind}-{words}-seed{seed}-{address}"


def _words(factors: Mapping[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in factors.items()]


@cache
def code_version() -> str:
    """A hash of the sources of frpo: results of different ones may differ, and the report says so."""
    root = Path(frpo.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"{frpo.__version__}+{digest.hexdigest()[:8]}"


def cells_folder(study: Path) -> Path:
    """Where the cells of a study lie."""
    return study / "cells"
