"""Running a step on tensors without data, and counting the bytes that would be alive at every moment of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations inside it allocate, until they are freed.

    Autograd is inside too: what it saves for the backward pass is alive until it lets go. ``now`` and ``peak`` are in
    bytes; ``held`` are tensors made before, which are never counted.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = [tensor.untyped_storage() for tensor in held]
        self._known: dict[int, Any] = {id(storage): None for storage in self._held}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._allocations = self._peak_at = 0
        self.now = self.peak = 0

    def restart(self) -> None:
        """Let the peak begin at what is alive now."""
        self.peak, self._peak_at = self.now, self._allocations

    def alive_at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of ``tensors``, all alive still, that were there at the peak."""
        storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        sizes = [self._sizes[key] for key in storages if key in self._sizes]
        return sum(size for size, allocation in sizes if allocation <= self._peak_at)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return tensor
        self._allocations += 1
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = (size, self._allocations)
        self.now += size
        if self.now > self.peak:
            self.restart()
        return tensor

    def _forget(self, key: int) -> None:
        del self._known[key]
        self.now -= self._sizes.pop(key)[0]


@contextmanager
def tracing(models: Iterable[nn.Module], *, autocast: bool) -> Iterator[LiveBytes]:
    """Inside, ``models`` of the meta device run as if on a device, in bfloat16 autocast if asked, and bytes count.

    Tensors made inside have no data either. The kernels are those of the CPU, whose attention keeps what the fused
    attention of a GPU keeps. Raises ``ValueError`` for a model whose code reads values.
    """
    with FakeTensorMode():
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for model in models:
            _fill(model, made)
        try:
            with (
                LiveBytes(new for _, new in made.values()) as live,
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                yield live
        except DataDependentOutputException as error:
            raise ValueError(
                f"the model's code reads values that are only known when it runs ({error}), so its memory cannot be "
                "planned; run a few steps instead"
            ) from error


def _fill(model: nn.Module, made: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Put a tensor with a device but without data in the place of every parameter and buffer, tied ones once.

    ``made`` holds the old beside the new by the old one's id, which stays taken as long as the old one is held.
    """
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in tables:
            for name, tensor in own.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = (tensor, _without_data(tensor))
                    own[name] = made[id(tensor)][1]


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
