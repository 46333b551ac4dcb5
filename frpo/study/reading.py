"""Reading and checking the YAML of a study."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from frpo.foundation.errors import ConfigError, clipped, suggestion
from frpo.foundation.yaml_files import find_file, read_with_includes
from frpo.study.spec import Axis, Entry, StudySpec, Tree, overlaid
from frpo.study.spelling import as_class, flat, flat_key

KEYS = (
    "name", "seeds", "methods", "downstream", "evaluation", "report", "tracking", "data_dir", "threads",
    "keep_checkpoints",
)  # fmt: skip
EVALUATION_KEYS = ("config", "suites", "policy_only", "at_steps", "every_n_train_steps")
ROLES = (
    "baseline", "primary", "safety", "helpfulness", "reward", "unseen", "sampled", "kl_reference", "kl_start", "tasks",
    "retained_from",
)  # fmt: skip
NOT_MEASURED = ("baseline", "primary", "tasks", "retained_from")


def read_study(path: str) -> StudySpec:
    """Read a study from a file here or a shipped recipe; what it includes comes first.

    Raises:
        ConfigError: a key that is unknown, missing or of the wrong kind, with what to write instead.
    """
    tree: Tree = {}
    for document in read_with_includes(path):
        tree = overlaid(tree, flat(document.tree))
    where = Path(path).name
    known = (
        "name",
        "seeds",
        "methods",
        "downstream",
        "evaluation",
        "report",
        "tracking",
        "threads",
        "keep_checkpoints",
    )
    _known(tree, known, where)
    methods, downstream = _entries(tree, "methods", where), _entries(tree, "downstream", where)
    _check_starts(methods, where)
    evaluation = _mapping(tree.get("evaluation"), f"{where}: evaluation")
    _known(evaluation, EVALUATION_KEYS, f"{where}: evaluation")
    suites = _suites(evaluation, where)
    roles = _mapping(tree.get("report"), f"{where}: report")
    _check_roles(roles, methods, downstream, suites, f"{where}: report")
    every = evaluation.get("every_n_train_steps")
    return StudySpec(
        name=str(tree.get("name", Path(path).stem)),
        seeds=_whole_numbers(tree.get("seeds", [0]), f"{where}: seeds", least=0),
        methods=methods,
        downstream=downstream,
        suites=suites,
        policy_only=_policy_only(evaluation, suites, where),
        at_steps=_whole_numbers(evaluation.get("at_steps", []), f"{where}: evaluation.at_steps", least=0),
        every_n_train_steps=None if every is None else _whole_number(every, f"{where}: evaluation.every_n_train_steps"),
        roles=roles,
        tracking=_tracking(tree.get("tracking"), where),
        data_dir=str(tree.get("data_dir", "data")),
        threads=_whole_number(tree.get("threads", 1), f"{where}: threads"),
        keep_checkpoints=bool(tree.get("keep_checkpoints", True)),
    )


def _policy_only(evaluation: Tree, suites: Tree, where: str) -> tuple[str, ...]:
    names = evaluation.get("policy_only", [])
    if not isinstance(names, list):
        raise ConfigError(f"{where}: evaluation.policy_only: got {_shown(names)}, expected a list of suites")
    for name in names:
        if not isinstance(name, str) or name not in suites:
            raise ConfigError(f"{where}: evaluation.policy_only: no suite {name!r}{suggestion(str(name), suites)}")
    return tuple(names)


def _check_roles(
    roles: Tree, methods: tuple[Entry, ...], downstream: tuple[Entry, ...], suites: Tree, where: str
) -> None:
    """The report is written last: what it will look for is looked for first."""
    _known(roles, ROLES, where)
    labels = [entry.label(factors) for entry in methods if entry.compare for factors, _ in entry.points()]
    for role in ("baseline", "primary"):
        if role in roles and roles[role] not in labels:
            raise ConfigError(f"{where}.{role}: no method {roles[role]!r}{suggestion(str(roles[role]), labels)}")
    tasks = _mapping(roles.get("tasks"), f"{where}.tasks")
    _known(tasks, tuple(entry.name for entry in downstream), f"{where}.tasks")
    study = where.removesuffix(": report")
    measures = [measure for name, suite in suites.items() for measure in _measures(name, suite, study)]
    named = {role: value for role, value in roles.items() if role not in NOT_MEASURED}
    for role, measure in {**named, **{f"tasks.{task}": value for task, value in tasks.items()}}.items():
        if measure not in measures:
            raise ConfigError(f"{where}.{role}: nothing measures {measure!r}{suggestion(str(measure), measures)}")


def _measures(name: str, suite: Any, where: str) -> list[str]:
    where = f"{where}: evaluation.suites.{name}"
    settings = _mapping(suite, where)
    kl_to = _mapping(settings.get("kl_to"), f"{where}: kl_to")
    kls = [f"kl/{key}/{part}" for key in kl_to for part in ("sequence", "token")]
    return [f"{name}/{quantity}" for quantity in [*_mapping(settings.get("scores"), f"{where}: scores"), *kls]]


def _tracking(value: Any, where: str) -> Tree | None:
    """Settings of the tracker, with ``${oc.env:...}`` filled in: the study's own run is opened before any other."""
    if value is None:
        return None
    from frpo.run.tracker import MLflowTracker

    known = tuple(inspect.signature(MLflowTracker).parameters)
    tree = _mapping(value, f"{where}: tracking")
    _known(tree, tuple(name for name in known if name not in ("output_dir", "run_name")), f"{where}: tracking")
    try:
        filled: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: tracking: {str(error).splitlines()[0]}") from error
    return dict(filled)


def _whole_number(value: Any, where: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{where}: got {_shown(value)}, expected a whole number from {least}")
    return value


def _whole_numbers(value: Any, where: str, least: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: got {_shown(value)}, expected a list of whole numbers from {least}, [0, 1, 2]")
    numbers = tuple(_whole_number(item, where, least) for item in value)
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"{where}: {value} names one twice")
    return numbers


def _suites(evaluation: Tree, where: str) -> Tree:
    """The suites of the files in ``config``, with ``suites`` laid over them; null takes one out."""
    suites: Tree = {}
    for file in _files(evaluation.get("config", []), f"{where}: evaluation", "conf/evaluation/tiny.yaml"):
        for document in read_with_includes(file):
            found = flat(_mapping(document.tree.get("evaluation"), f"{where}: {file}"))
            suites = overlaid(suites, found.get("suites", {}))
    suites = overlaid(suites, _mapping(evaluation.get("suites"), f"{where}: evaluation.suites"))
    suites = {name: suite for name, suite in suites.items() if suite is not None}
    if not suites:
        raise ConfigError(
            f"{where}: evaluation: got no suites; name files that have some, config: [conf/evaluation/tiny.yaml]"
        )
    return suites


def _files(value: Any, where: str, example: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(file, str) for file in value):
        raise ConfigError(f"{where}: config: got {_shown(value)}, expected a list of files, [{example}]")
    for file in value:
        find_file(file, None)
    return value


def _entries(tree: Tree, key: str, where: str) -> tuple[Entry, ...]:
    entries = _mapping(tree.get(key), f"{where}: {key}")
    return tuple(_entry(name, value, f"{where}: {key}.{name}", key == "methods") for name, value in entries.items())


def _entry(name: str, value: Any, where: str, is_method: bool) -> Entry:
    tree = _mapping(value, where)
    own = ("policy", "from", "family", "compare") if is_method else ()
    _known(tree, ("config", "settings", "factors", "grid", *own), where)
    config = _files(tree.get("config", []), where, "recipes/tiny/grpo.yaml")
    policy, start = as_class(tree.get("policy")), tree.get("from")
    if start is not None and not isinstance(start, str):
        raise ConfigError(f"{where}: from: got {_shown(start)}, expected the name of a method")
    if policy is not None:
        _mapping(policy, f"{where}: policy")
    if is_method and (policy is None) == (not config):
        raise ConfigError(
            f"{where}: expected either `config: [RECIPE]` with `from: METHOD`, to train, or "
            "`policy: {class_path: ..., init_args: ...}`, to take a model as it is"
        )
    unused = [key for key in ("settings", "grid", "from") if key in tree] if policy is not None else []
    if unused:
        raise ConfigError(
            f"{where}: {unused[0]}: a `policy` is taken as it is; write what is to be set into it, or train it by "
            "`config`"
        )
    if is_method and config and start is None:
        raise ConfigError(f"{where}: from: missing; name the method whose policy this one starts from")
    if not is_method and not config:
        raise ConfigError(f"{where}: config: missing; name the recipe of the fine-tuning run")
    return Entry(
        name=name,
        config=tuple(config),
        settings=_mapping(tree.get("settings"), f"{where}.settings"),
        policy=policy,
        start=start,
        family=str(tree.get("family", name)),
        factors=_mapping(tree.get("factors"), f"{where}.factors"),
        grid=tuple(
            _axis(axis, spec, f"{where}.grid.{axis}") for axis, spec in _mapping(tree.get("grid"), where).items()
        ),
        compare=bool(tree.get("compare", True)),
    )


def _axis(name: str, value: Any, where: str) -> Axis:
    tree = _mapping(value, where)
    _known(tree, ("key", "values"), where)
    key, values = tree.get("key"), tree.get("values")
    keys = (key,) if isinstance(key, str) else tuple(key) if isinstance(key, list) else ()
    if isinstance(values, list):
        values = {str(value): value for value in values}
    if not keys or not all(isinstance(key, str) for key in keys) or not isinstance(values, dict) or not values:
        raise ConfigError(
            f"{where}: expected `key`, a dotted setting (or a list of them), and `values`, a list or a mapping of "
            "label to value: {key: model.objective.lam, values: [1.0, 0.3]}"
        )
    return Axis(name, tuple(map(flat_key, keys)), {str(label): value for label, value in values.items()})


def _check_starts(methods: tuple[Entry, ...], where: str) -> None:
    if not methods:
        raise ConfigError(f"{where}: methods: got none, expected at least one with a `policy` to start from")
    seen: dict[str, Entry] = {}
    for entry in methods:
        if entry.start is not None and entry.start not in seen:
            raise ConfigError(
                f"{where}: methods.{entry.name}.from: {entry.start!r} is no method given before it"
                f"{suggestion(entry.start, seen)}"
            )
        if entry.start is not None and seen[entry.start].grid:
            raise ConfigError(
                f"{where}: methods.{entry.name}.from: {entry.start!r} has a grid, and which of its policies is meant "
                "cannot be said; start from a method without one"
            )
        seen[entry.name] = entry


def _mapping(value: Any, where: str) -> Tree:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: got {_shown(value)}, expected a mapping")
    return value


def _shown(value: Any) -> str:
    return clipped(repr(value))


def _known(tree: Tree, known: tuple[str, ...], where: str) -> None:
    for key in tree:
        if key not in known:
            raise ConfigError(f"{where}: {key}: unknown key{suggestion(str(key), known)}")
