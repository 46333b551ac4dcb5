"""Half precision for the weights alone (``bf16-true``, ``16-true``): what else is computed stays wide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Within, new tensors are float32; also a decorator.

    Under a half precision Lightning makes that the default type for the whole of a step, rewards and averages included.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
