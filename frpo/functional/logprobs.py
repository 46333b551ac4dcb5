"""Token log-probabilities and exact KL from logits, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from frpo.functional.kl import full_kl
from frpo.functional.truncation import truncate

# Positions per chunk: at a vocabulary of 150k one float32 chunk is 0.6 GB, whatever the batch.
CHUNK = 1024


def token_logprobs(
    logits: Tensor, ids: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Log-probability of ``ids`` under ``softmax(logits / temperature)``, truncated as the sampler truncates.

    Shapes: logits [..., V], ids int64 [...] -> [...], in float32 or wider whatever the logits' dtype. Computed
    ``CHUNK`` positions at a time and recomputed in the backward pass, so that no float32 copy of all logits exists.

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    >>> token_logprobs(logits, torch.tensor([0]))
    tensor([-0.6931])
    >>> token_logprobs(logits, torch.tensor([0]), top_p=0.5)  # the nucleus holds this token alone
    tensor([0.])
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"token_logprobs: got logits {tuple(logits.shape)} and ids {tuple(ids.shape)}, expected [..., V] and [...]"
        )

    def chunk_logprobs(chunk: Tensor, chunk_ids: Tensor) -> Tensor:
        scaled = truncate(_wide(chunk) / temperature, top_k=top_k, top_p=top_p, keep=chunk_ids)
        picked = scaled.gather(-1, chunk_ids.unsqueeze(-1)).squeeze(-1)
        return picked - torch.logsumexp(scaled, -1)

    return _chunked(chunk_logprobs, logits.flatten(0, -2), ids.flatten()).view(ids.shape)


def token_full_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """:func:`~frpo.functional.kl.full_kl` of logits at one temperature: [..., V], [..., V] -> [...], chunked as above.

    >>> token_full_kl(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=2.0)
    tensor([0.1109])
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"token_full_kl: got {tuple(logits.shape)} and {tuple(ref_logits.shape)}, expected one shape")

    def chunk_kl(chunk: Tensor, ref_chunk: Tensor) -> Tensor:
        return full_kl(_wide(chunk) / temperature, _wide(ref_chunk) / temperature)

    return _chunked(chunk_kl, logits.flatten(0, -2), ref_logits.flatten(0, -2)).view(logits.shape[:-1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunked(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    pieces = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    if first.requires_grad and torch.is_grad_enabled():
        return torch.cat([checkpoint(function, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in pieces])
    return torch.cat([function(a, b) for a, b in pieces])
