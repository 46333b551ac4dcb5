"""Top-k and top-p, the same where tokens are drawn and where their probability is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def truncate(logits: Tensor, *, top_k: int | None = None, top_p: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Set the logits outside the top-k, then outside the nucleus, to -inf: [..., V] -> [..., V].

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p`` (Holtzman et al. 2020, arXiv
    1904.09751). ``keep`` int64 [...] names one token per row that always stays, the one that was drawn: otherwise a
    rounding difference between the sampler's and the trainer's forward pass could give it probability 0. The gradient
    takes the set of cut tokens as constant.

    >>> truncate(torch.tensor([2.0, 1.0, 0.0]), top_k=2)
    tensor([2., 1., -inf])
    >>> truncate(torch.tensor([2.0, 1.0, 0.0]), top_p=0.5, keep=torch.tensor(2))
    tensor([2., -inf, 0.])
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
