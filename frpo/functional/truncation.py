"""Temperature, top-k and top-p, applied alike where tokens are drawn and where their probability is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def truncate(logits: Tensor, *, top_k: int | None = None, top_p: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Set the logits outside the top-k, then outside the nucleus, to -inf: [..., V] -> [..., V].

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p`` (Holtzman et al. 2020).
    ``keep`` int64 [...] names one token a row that always stays: the token that was drawn, so that a rounding
    difference between the sampler's and the trainer's forward pass cannot give it probability 0. Which tokens are cut
    is treated as a constant by the gradient.
    """
    if top_k is None and top_p >= 1.0:
        return logits
    with torch.no_grad():
        drop = torch.zeros_like(logits, dtype=torch.bool)
        if top_k is not None and top_k < logits.shape[-1]:
            drop |= logits < logits.topk(top_k, -1).values[..., -1:]
        if top_p < 1.0:
            ordered, order = logits.masked_fill(drop, -torch.inf).sort(-1, descending=True)
            probs = ordered.softmax(-1)
            beyond = probs.cumsum(-1) - probs >= top_p
            drop |= torch.zeros_like(drop).scatter(-1, order, beyond)
        if keep is not None:
            drop = drop.scatter(-1, keep.unsqueeze(-1), False)
    return logits.masked_fill(drop, -torch.inf)
