"""Sampling on the weights that train, in the process that trains them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from frpo.foundation import require
from frpo.functional.truncation import truncate
from frpo.models.sharding import gathered
from frpo.rollouts.sampler import Sampler, uniform_noise
from frpo.types import PromptBatch, RolloutBatch


class InProcessSampler(Sampler):
    """Token by token with a key-value cache.

    A prompt is computed once for its whole group; a sequence that has ended leaves the batch, so it costs nothing more.
    Sharded weights are gathered for the time of sampling, so that ranks need not wait for each other's longest
    completion: the whole policy has to fit on each rank then, beside the cache.

    Args:
        max_new_tokens, temperature, top_p, top_k: see :class:`~frpo.rollouts.sampler.Sampler`.
        max_sequences: most sequences decoded at once, a multiple of the group size or more; null decodes all. Bounds
            the memory of the cache and does not change what is drawn.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        max_sequences: int | None = None,
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_p, top_k)
        self.max_sequences = require.number(
            "InProcessSampler.max_sequences", max_sequences, at_least=1, hint="null decodes all"
        )

    @torch.no_grad()
    def sample(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: PromptBatch, *, group_size: int, seed: int
    ) -> RolloutBatch:
        """See :class:`~frpo.rollouts.sampler.Sampler`."""
        P, T = len(prompts), self.max_new_tokens
        noise = uniform_noise(seed, prompts.position, group_size, T)
        eos = end_tokens(model, tokenizer)
        step = P if self.max_sequences is None else max(1, self.max_sequences // group_size)
        was_training = model.training
        model.eval()
        try:
            with gathered(model):
                parts = [
                    self._decode(
                        model, prompts.input_ids[i : i + step], prompts.mask[i : i + step], noise[i : i + step], eos
                    )
                    for i in range(0, P, step)
                ]
        finally:
            model.train(was_training)
        ids, mask, logps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        broken = ~torch.isfinite(logps).all(-1).all(-1)
        if broken.any():
            named = ", ".join(prompts.prompts[i].id for i in broken.nonzero().flatten().tolist())
            raise FloatingPointError(
                f"the model's logits for prompt(s) {named} are not finite while sampling: its weights or activations "
                "have overflowed. Go on from an earlier checkpoint with a lower learning rate, or use bf16-mixed or "
                "32-true"
            )
        longest = max(1, int(mask.sum(-1).max()))
        ids, mask, logps = ids[..., :longest], mask[..., :longest], logps[..., :longest]
        ids = ids.masked_fill(~mask, tokenizer.pad_token_id)
        last = ids.gather(-1, (mask.sum(-1, keepdim=True) - 1).clamp(min=0)).squeeze(-1)
        texts = tokenizer.batch_decode(
            [row[keep] for row, keep in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)],
            skip_special_tokens=True,
        )
        return RolloutBatch(
            prompts=prompts,
            completion_ids=ids,
            mask=mask,
            logps=logps,
            truncated=~torch.isin(last, eos.to(last.device)),
            texts=tuple(tuple(texts[i : i + group_size]) for i in range(0, P * group_size, group_size)),
        )

    def _decode(
        self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor, noise: Tensor, eos: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Completion ids, mask and log-probabilities [p, G, T] of prompts [p, L] under noise [p, G, T]."""
        p, G, T = noise.shape
        device = prompt_ids.device
        noise, eos = noise.flatten(0, 1).to(device), eos.to(device)
        ids = torch.zeros(p * G, T, dtype=torch.int64, device=device)
        mask = torch.zeros(p * G, T, dtype=torch.bool, device=device)

        attention = prompt_mask.long()
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        out = model(
            input_ids=prompt_ids, attention_mask=attention, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
        cache.batch_repeat_interleave(G)
        logits = out.logits[:, -1].repeat_interleave(G, 0)
        attention, position = (x.repeat_interleave(G, 0) for x in (attention, positions[:, -1]))
        logps = torch.zeros(p * G, T, dtype=torch.promote_types(logits.dtype, torch.float32), device=device)
        alive = torch.arange(p * G, device=device)
        for t in range(T):
            token, logp = self._draw(logits, noise[alive, t])
            ids[alive, t], logps[alive, t], mask[alive, t] = token, logp, True
            going = ~torch.isin(token, eos)
            if not bool(going.all()):
                kept = going.nonzero().squeeze(-1)
                alive, token, attention, position = alive[kept], token[kept], attention[kept], position[kept]
                cache.batch_select_indices(kept)
            if t + 1 == T or not len(alive):
                break
            position = position + 1
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], -1)
            out = model(
                input_ids=token.unsqueeze(-1),
                attention_mask=attention,
                position_ids=position.unsqueeze(-1),
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits = out.past_key_values, out.logits[:, -1]
        return ids.view(p, G, T), mask.view(p, G, T), logps.view(p, G, T)

    def _draw(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One token per row by inverting the distribution function at ``noise``, and its log-probability."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature == 0:
            token = wide.argmax(-1)
            logp = wide.log_softmax(-1)
        else:
            logp = truncate(wide / self.temperature, top_k=self.top_k, top_p=self.top_p).log_softmax(-1)
            cdf = logp.double().exp().cumsum(-1)
            # Strictly below the total, so that a token of probability 0 is never reached.
            target = torch.minimum(noise * cdf[:, -1], torch.nextafter(cdf[:, -1], torch.zeros_like(noise)))
            token = torch.searchsorted(cdf, target.unsqueeze(-1), right=True).squeeze(-1)
            token = token.clamp(max=cdf.shape[-1] - 1)  # beyond it where logits are NaN, which sample() reports
        return token, logp.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids that end a completion: the tokenizer's and those of the model's generation settings, int64 [n]."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return torch.tensor(sorted({i for i in (*listed, tokenizer.eos_token_id) if i is not None}))
