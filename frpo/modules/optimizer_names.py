"""An optimiser's state by the names of the weights, so that it fits whatever the strategy and number of ranks.

A plain optimiser numbers the weights it was given, a checkpoint of sharded weights all weights of the module: with an
adapter the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def by_name(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state with the name ``names[i]`` in place of the number i; empty where this rank holds none."""
    return _renamed(state, dict(enumerate(names)))


def by_number(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state as an optimiser over the weights ``names``, in this order, loads it."""
    return _renamed(state, {name: i for i, name in enumerate(names)})


def _renamed(state: dict[str, Any], keys: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys that are not in ``keys`` stay; the weights of a group come in the order of ``keys``."""
    if not state:
        return state
    place = {new: i for i, new in enumerate(keys.values())}
    groups = [
        {**group, "params": sorted((keys.get(key, key) for key in group["params"]), key=lambda key: place.get(key, -1))}
        for group in state["param_groups"]
    ]
    return {
        **state,
        "state": {keys.get(key, key): value for key, value in state["state"].items()},
        "param_groups": groups,
    }
