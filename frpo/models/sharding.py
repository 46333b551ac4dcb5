"""Weights spread over ranks (FSDP2): which parts of a model are cut, and reading them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Cut the weights of a causal LM, in place, over the ranks of a one-dimensional ``mesh``.

    Each layer is gathered for its own forward and backward pass alone; embeddings and head go with the model. Of a
    PeftModel the language model within is cut, adapter included. A rank keeps its part of the weights it has, so these
    must be the same on every rank.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = set(inner._no_split_modules or ())
    for module in inner.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # Said for the model too: by default it would keep its own weights after a pass without gradient, and the next pass
    # would miss the update between the two.
    fully_shard(inner, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Within, sharded ``models`` have their whole weights on every rank, and a forward pass needs no other rank.

    Ranks may then run different numbers of passes, as generation does. For passes without gradient. Every rank must
    enter; whole and unsharded models are left alone.
    """
    roots = [root for root in map(_root, models) if root is not None and _is_cut(root)]
    parts = [module for root in roots for module in root.modules() if isinstance(module, FSDPModule)]
    with torch.inference_mode(False):  # buffers made in validation serve training as well
        for part in parts:
            part.unshard()
    for root in roots:
        root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for root in roots:
            root.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


def reduce_in_backward(model: nn.Module, reduce: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or leaves them for a later one to take along.

    Until then a rank holds the gradient of all weights that train. Nothing to do for a model that is not sharded.
    """
    root = _root(model)
    if root is not None:
        root.set_requires_gradient_sync(reduce)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of ``tensors`` together, over all ranks where they are sharded: a scalar."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _root(model: nn.Module | None) -> Any:
    """The outermost sharded module, None where nothing is."""
    modules = () if model is None else model.modules()
    return next((module for module in modules if isinstance(module, FSDPModule)), None)


def _is_cut(root: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in root.parameters())
