"""What a study measured, as one long table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class StudyResults:
    """The measurements of a study.

    ``frame`` has one row for each completion and quantity. Its columns: ``method`` and ``family``; a column
    ``method.NAME`` for each factor of the methods (``method.lambda``, say; NaN where a method has no such factor);
    ``seed``; ``task``, the downstream task, or "" for a policy as trained; ``downstream.NAME`` for each factor of the
    fine-tuning (``downstream.lr``; NaN where ``task`` is ""); ``step``, optimiser steps of the fine-tuning, 0 for a
    policy as trained; ``suite``, ``prompt_id``, ``prompt_task``, ``sample``, ``quantity`` (a score, or
    ``kl/NAME/sequence`` in nats a completion, ``kl/NAME/token`` in nats a token), ``value`` (NaN unless ``status`` is
    "value") and ``status``.

    ``roles`` says which measurement plays which part: ``baseline`` a method; ``safety``, ``helpfulness``, ``reward``,
    ``unseen``, ``sampled``, ``kl_reference`` and ``kl_start`` each ``suite/quantity``; ``tasks`` one for each
    downstream task; ``retained_from`` the downstream step from which on a score counts as retained. ``missing`` names
    the cells that are not done, ``versions`` the versions of the code that made those that are.
    """

    name: str
    frame: pd.DataFrame
    roles: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
