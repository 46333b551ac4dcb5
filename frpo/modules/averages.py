"""Weighted averages by name, in one torchmetrics metric."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric


class Averages(Metric):
    """The mean of each of a fixed list of quantities, over all values seen on all ranks.

    One metric with two vectors rather than one metric a name: a single reduction, and ranks agree on the names even
    where a rank saw no value for one (a task that was not in its batch).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = list(dict.fromkeys(names))
        self.add_state("total", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.names)), dist_reduce_fx="sum")

    def update(self, name: str, values: Tensor | float, mask: Tensor | None = None) -> None:
        """Add ``values`` (any shape) where ``mask`` (bool, same shape) is True: each counts once."""
        index = self.names.index(name)
        values = torch.as_tensor(values, device=self.total.device).detach().to(self.total.dtype)
        if mask is not None:
            values = values[mask.to(values.device)]
        self.total[index] += values.sum()
        self.count[index] += values.numel()

    def compute(self) -> dict[str, float]:
        """Mean by name, for the names that have a value."""
        pairs = zip(self.names, self.total.tolist(), self.count.tolist(), strict=True)
        return {name: total / count for name, total, count in pairs if count}
