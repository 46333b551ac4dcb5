"""What a run holds in memory, line by line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Line:
    """Some bytes, and how they were computed. ``whole``: every rank holds all of them, whatever the strategy."""

    name: str
    bytes: int
    how: str
    whole: bool = False


@dataclass(frozen=True)
class Phase:
    """What a part of a training step holds at its peak, beside what is held throughout."""

    name: str
    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        """Its bytes."""
        return sum(line.bytes for line in self.lines)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one rank: parameters by number, what is held throughout, and the phases, one at a time.

    ``loaded``: bytes of policy and reference, which a rank loads whole before its device has them.
    """

    trainable: int
    frozen: int
    loaded: int
    held: tuple[Line, ...]
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def total(self) -> int:
        """Bytes at the peak: what is held throughout and the largest phase."""
        return sum(line.bytes for line in self.held) + self.largest.total


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def weights(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of ``model``, tied ones once."""
    return size([*model.parameters(), *model.buffers()])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
