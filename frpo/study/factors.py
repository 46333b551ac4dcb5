"""The factors of a method, read from its configuration: what the report compares at equal beta must be so."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from frpo.foundation.errors import ConfigError
from frpo.study.spec import Tree
from frpo.study.spelling import as_class

OBJECTIVE = "FRPO"


def factors_of(config: Tree) -> dict[str, Any]:
    """``lambda`` and ``estimator`` of FRPO, ``beta``, ``beta_scale`` and ``kl`` (the estimator) of the penalty.

    Only what the merged configuration has: a method without an objective has none of them. A beta that is a schedule
    is named by its class. ``config`` is spelled by :func:`frpo.study.spelling.flat`.
    """
    from frpo.objectives import FRPO
    from frpo.penalty import KLPenalty

    settings = config.get("model", {})
    objective = as_class(settings.get("objective"))
    if objective is None:
        return {}
    found: dict[str, Any] = {}
    if objective.get("class_path") == OBJECTIVE:
        own = {**_defaults(FRPO), **objective}
        found = {"lambda": own["lam"], "estimator": _name(own["estimator"] or FRPO().estimator).lower()}
    penalty = {**_defaults(KLPenalty), **(as_class(settings.get("kl")) or {})}
    beta = penalty["beta"]
    scale, estimator = penalty["beta_scale"], penalty["estimator"]
    return {**found, "beta": _name(beta) if isinstance(beta, Mapping) else beta, "beta_scale": scale, "kl": estimator}


def checked_factors(declared: Mapping[str, Any], config: Tree, where: str) -> dict[str, Any]:
    """The factors of ``config`` and what else is ``declared``.

    Raises:
        ConfigError: a declared factor is not what the configuration says.
    """
    found = factors_of(config)
    for name, value in declared.items():
        if name in found and str(found[name]) != str(value):
            raise ConfigError(
                f"{where}: factors.{name}: got {value}, but the configuration of its run says {found[name]}; leave it "
                "out, as it is read from there"
            )
    return {**found, **declared}


def _defaults(cls: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}


def _name(described: Any) -> str:
    """The class of an object, or of its description in YAML."""
    if isinstance(described, Mapping):
        return str(described["class_path"]).rsplit(".", 1)[-1]
    return described.rsplit(".", 1)[-1] if isinstance(described, str) else type(described).__name__
