"""Weights spread over ranks (FSDP1 and FSDP2): which parts of a model are cut, and reading them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap
from torch.distributed.tensor import DTensor


def shard(model: Any, mesh: DeviceMesh | None) -> Any:
    """Cut the weights of a causal LM over the ranks, and return the model to run.

    Each layer is gathered for its own forward and backward pass alone; embeddings and head go with the model. A rank
    keeps its part of the weights it has, so these must be the same on every rank. With a one-dimensional ``mesh`` the
    cut is FSDP2's, in place: of a PeftModel the language model within is cut, adapter included. Without, it is FSDP1's
    within the context of a strategy that is (``torch.distributed.fsdp.wrap.enable_wrap``), and elsewhere none is made.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(inner._no_split_modules or ())
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    if mesh is None:
        # Gathered as they are stored: FSDP's own mixed precision would round the buffers positions are computed with.
        policy = ModuleWrapPolicy({type(layer) for layer in layers})
        try:
            return wrap(model, auto_wrap_policy=policy, mixed_precision=None)
        except ValueError as error:
            raise _of_one_type(model, error) from error
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # Said for the model too: by default it would keep its own weights after a pass without gradient, and the next pass
    # would miss the update between the two.
    fully_shard(inner, mesh=mesh, reshard_after_forward=True)
    return model


def _of_one_type(model: nn.Module, error: ValueError) -> ValueError:
    types = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if len(types) < 2:
        return error
    return ValueError(
        f"FSDPStrategy cuts weights of one type, got {' and '.join(types)} (an adapter's are float32 or wider); write "
        "policy.init_args.dtype: float32, or `include: [conf/trainer/fsdp2.yaml]`"
    )


def unwrapped(model: Any) -> Any:
    """The model without the wrapper that FSDP1 puts around it."""
    return model.module if isinstance(model, FullyShardedDataParallel) else model


def clean(name: str) -> str:
    """The name of a parameter without the wrappers of FSDP1, as a checkpoint has it."""
    return name.replace("_fsdp_wrapped_module.", "")


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Within, sharded ``models`` have their whole weights on every rank, and a forward pass needs no other rank.

    Ranks may then run different numbers of passes, as generation does. For passes without gradient. Every rank must
    enter; whole and unsharded models are left alone.
    """
    with ExitStack() as stack:
        for root in map(_root, models):
            if isinstance(root, FSDPModule) and _is_cut(root):
                stack.enter_context(_whole(root))
            elif isinstance(root, FullyShardedDataParallel) and "forward" not in vars(root):
                stack.enter_context(_summoned(root))
        yield


@contextmanager
def _whole(root: Any) -> Iterator[None]:
    parts = [module for module in root.modules() if isinstance(module, FSDPModule)]
    with torch.inference_mode(False):  # buffers made in validation serve training as well
        for part in parts:
            part.unshard()
    root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        root.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


@contextmanager
def _summoned(root: FullyShardedDataParallel) -> Iterator[None]:
    parts: list[Any] = FullyShardedDataParallel.fsdp_modules(root)
    with ExitStack() as stack:
        with torch.inference_mode(False):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(root, writeback=False))
        for part in parts:
            part.forward = part.module.__call__  # past the wrapper, which would gather and cut once more
        try:
            yield
        finally:
            for part in parts:
                del part.forward


def reduce_in_backward(model: nn.Module, reduce: bool) -> AbstractContextManager[None]:
    """Whether the backward pass within sums gradients over ranks, or leaves them for a later one to take along.

    Until then a rank holds the gradient of all weights that train. Nothing to do for a model that is not sharded.
    """
    root = _root(model)
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(reduce)
    elif isinstance(root, FullyShardedDataParallel) and not reduce:
        return root.no_sync()
    return nullcontext()


def total_norm(model: nn.Module, tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of ``tensors`` together, over all ranks where they are sharded: a scalar.

    ``tensors`` are cut as the parameters of ``model`` are.
    """
    norm = torch.nn.utils.get_total_norm(list(tensors))
    root = _root(model)
    if isinstance(root, FullyShardedDataParallel):
        # A rank that holds no part of them has a norm of another type and device.
        square = norm.to(root.compute_device, torch.float64).square()
        torch.distributed.all_reduce(square, group=root.process_group)
        return square.sqrt()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _root(model: nn.Module | None) -> Any:
    """The outermost sharded module, None where nothing is."""
    modules = () if model is None else model.modules()
    return next((m for m in modules if isinstance(m, FSDPModule | FullyShardedDataParallel)), None)


def _is_cut(root: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in root.parameters())
