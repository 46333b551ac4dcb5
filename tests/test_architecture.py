"""The arrows between the files of frpo: one way along the corridor, wings to the corridor, cli to all, nothing back."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import frpo
from frpo.__main__ import COMMANDS

ROOT = Path(frpo.__file__).parent
FILES = {file.relative_to(ROOT.parent).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
CORRIDOR = (
    ("foundation",),
    ("types",),
    ("functional",),
    ("estimators", "objectives", "penalty", "schedules"),
    ("data",),
    ("models",),
    ("rollouts",),
    ("rewards",),
    ("modules",),
)
"""In walking order: a room imports itself, its neighbours in the same row, and the rows before."""
STEP = {room: step for step, rooms in enumerate(CORRIDOR) for room in rooms}
WINGS = ("tiny", "tar", "reward_modelling", "run", "evaluation", "study", "report", "plan")
FRONT_DOOR = ("__init__", "__main__")
CLI = "cli"


class Arrow(NamedTuple):
    """``source`` imports ``names`` from ``target``; both are files, ``frpo/run/tracker.py``."""

    source: str
    target: str
    names: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}: {self.names}"


def file_of(module: str) -> str | None:
    """The file of a module of frpo, None where there is none."""
    path = module.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in FILES), None)


def room(file: str) -> str:
    """The folder of a file below ``frpo/``, or its own name at the top."""
    return file.split("/")[1].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of each import in a node, wherever it stands: a module's, a function's, or for type checkers."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import; write it in full"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if file_of(inner) else frpo._HOMES.get(alias.name, node.module), alias.name
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        for argument in node.args[:1]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value, argument.value


def arrows_of(source: str, text: str) -> list[Arrow]:
    """The arrows from the file ``source``, whose content is ``text``, one for each file that it imports."""
    names: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(text)):
        for module, name in imported(node):
            target = file_of(module)
            if target is not None and target != source:
                names.setdefault(target, set()).add(name)
    return [Arrow(source, target, ", ".join(sorted(found))) for target, found in names.items()]


@pytest.fixture(scope="module")
def arrows() -> list[Arrow]:
    return [arrow for source, file in FILES.items() for arrow in arrows_of(source, file.read_text(encoding="utf-8"))]


def upstream(arrow: Arrow) -> bool:
    """Whether an arrow between corridor rooms goes the way of the walk."""
    return STEP[room(arrow.target)] <= STEP[room(arrow.source)]


def back_up(arrows: Iterable[Arrow]) -> list[Arrow]:
    """The arrows from the corridor to what comes later in it, or to what stands beside it."""
    inner = [a for a in arrows if room(a.source) in STEP and room(a.target) not in FRONT_DOOR]
    return [a for a in inner if room(a.target) not in STEP or not upstream(a)]


def between_wings(arrows: Iterable[Arrow]) -> list[Arrow]:
    """The arrows from one wing to another."""
    return [a for a in arrows if {room(a.source), room(a.target)} <= set(WINGS) and room(a.source) != room(a.target)]


def into_cli(arrows: Iterable[Arrow]) -> list[Arrow]:
    """The arrows to the command line, or to ``__main__``, from anywhere else."""
    allowed = (CLI, "__main__")
    return [a for a in arrows if room(a.target) in allowed and room(a.source) not in allowed]


def circles(arrows: Iterable[Arrow]) -> list[list[Arrow]]:
    """Circles of files that import each other, until cutting one arrow of each leaves none."""
    known = {(a.source, a.target): a for a in arrows}
    graph: dict[str, set[str]] = {}
    for source, target in known:
        graph.setdefault(source, set()).add(target)
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            files = error.args[1][::-1]
            found.append([known[pair] for pair in pairwise(files)])
            graph[files[0]].remove(files[1])
        else:
            return found


def listed(arrows: Iterable[Arrow]) -> str:
    return "\n".join(["", *map(str, arrows)])


def test_every_room_is_known():
    known = {*STEP, *WINGS, *FRONT_DOOR, CLI}
    rooms = {room(file) for file in FILES}
    assert rooms <= known, f"give {sorted(rooms - known)} a place in the corridor or among the wings"
    assert known <= rooms, f"{sorted(known - rooms)} are gone"


def test_no_files_import_each_other_in_a_circle(arrows: list[Arrow]):
    found = circles(arrows)
    assert not found, "\n".join(map(listed, found))


def test_the_corridor_imports_only_what_comes_before(arrows: list[Arrow]):
    found = back_up(arrows)
    assert not found, listed(found)


def test_no_wing_imports_another(arrows: list[Arrow]):
    found = between_wings(arrows)
    assert not found, listed(found)


def test_only_the_command_imports_the_command_line(arrows: list[Arrow]):
    found = into_cli(arrows)
    assert not found, listed(found)


def test_every_command_lives_in_the_command_line():
    homes = {name: command.home for name, command in COMMANDS.items() if not command.home.startswith("frpo.cli.")}
    assert not homes


def test_an_import_counts_wherever_it_stands():
    text = """
from typing import TYPE_CHECKING
from frpo import FRPO, __version__
from frpo.run import tracker
import frpo.types
if TYPE_CHECKING:
    from frpo.objectives import GRPO
def late():
    from frpo.study.cells import Cell, expand
    return import_module("frpo.report.page"), importlib.import_module("frpo.plan.plan"), import_module(name)
"""
    assert sorted(map(str, arrows_of("frpo/x.py", text))) == [
        "frpo/x.py -> frpo/__init__.py: __version__",
        "frpo/x.py -> frpo/objectives.py: FRPO, GRPO",
        "frpo/x.py -> frpo/plan/plan.py: frpo.plan.plan",
        "frpo/x.py -> frpo/report/page.py: frpo.report.page",
        "frpo/x.py -> frpo/run/tracker.py: tracker",
        "frpo/x.py -> frpo/study/cells.py: Cell, expand",
        "frpo/x.py -> frpo/types.py: frpo.types",
    ]


def test_an_arrow_that_is_not_allowed_is_found():
    def arrow(source: str, target: str) -> Arrow:
        return Arrow(f"frpo/{source}.py", f"frpo/{target}.py", "x")

    fine = [
        arrow("types", "foundation/errors"),
        arrow("objectives", "estimators"),
        arrow("models/export", "__init__"),
        arrow("study/cells", "models/policy"),
        arrow("study/cells", "study/spec"),
        arrow("cli/study", "study/cells"),
        arrow("__main__", "cli/study"),
    ]
    later, beside, wing, caller = (
        arrow("data/rows", "models/policy"),
        arrow("modules/supervised", "run/tracker"),
        arrow("report/page", "study/cells"),
        arrow("study/one", "cli/training"),
    )
    assert back_up([*fine, later, beside]) == [later, beside]
    assert between_wings([*fine, wing]) == [wing]
    assert into_cli([*fine, caller]) == [caller]
    assert circles(fine) == []
    there, back = arrow("a", "b"), arrow("b", "a")
    assert sorted(*circles([*fine, there, back])) == [there, back]
