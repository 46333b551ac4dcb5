"""The in-process sampler against a plain re-computation without cache, padding or batching."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_models import build_tokenizer
from transformers import AutoModelForCausalLM

from frpo.functional.truncation import truncate
from frpo.rollouts.in_process import InProcessSampler, end_tokens
from frpo.rollouts.sampler import uniform_noise
from frpo.types import Prompt, PromptBatch


@pytest.fixture(scope="module")
def policy(model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def batch(tokenizer, texts: list[str], first: int = 0) -> PromptBatch:
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return PromptBatch(
        prompts=tuple(Prompt(str(i), ({"role": "user", "content": t},), "any") for i, t in enumerate(texts)),
        texts=tuple(texts),
        input_ids=encoded["input_ids"],
        mask=encoded["attention_mask"].bool(),
        position=torch.arange(first, first + len(texts)),
    )


TEXTS = ["<user> w1 w2 w3 <assistant>", "<user> w9 <assistant>", "<user> w4 w5 <assistant>"]


@torch.no_grad()
def one_by_one(policy, sampler, ids: list[int], noise: list[float], eos: set[int]) -> tuple[list[int], list[float]]:
    """Sample one sequence by running the whole prefix anew at every token."""
    drawn, logps = [], []
    for u in noise:
        logits = policy(torch.tensor([ids + drawn])).logits[0, -1] / sampler.temperature
        logp = truncate(logits, top_k=sampler.top_k, top_p=sampler.top_p).log_softmax(-1)
        total, token = 0.0, None
        for v, p in enumerate(logp.exp().tolist()):
            total += p
            if p > 0 and total > u * logp.exp().sum().item():
                token = v
                break
        drawn.append(token)
        logps.append(logp[token].item())
        if token in eos:
            break
    return drawn, logps


@pytest.mark.parametrize(
    "sampler",
    [
        InProcessSampler(max_new_tokens=12),
        InProcessSampler(max_new_tokens=12, temperature=0.7, top_p=0.8),
        InProcessSampler(max_new_tokens=12, temperature=1.3, top_k=5),
        InProcessSampler(max_new_tokens=12, max_sequences=4),
    ],
)
def test_agrees_with_sampling_one_by_one(policy, tokenizer, sampler) -> None:
    prompts, G = batch(tokenizer, TEXTS, first=5), 4
    rollout = sampler.sample(policy, tokenizer, prompts, group_size=G, seed=3)
    noise = uniform_noise(3, prompts.position, G, sampler.max_new_tokens)
    eos = set(end_tokens(policy, tokenizer).tolist())
    ended = 0
    for p in range(len(prompts)):
        ids = prompts.input_ids[p][prompts.mask[p]].tolist()
        for g in range(G):
            drawn, logps = one_by_one(policy, sampler, ids, noise[p, g].tolist(), eos)
            mask = rollout.mask[p, g]
            assert rollout.completion_ids[p, g][mask].tolist() == drawn
            assert torch.allclose(rollout.logps[p, g][mask], torch.tensor(logps, dtype=torch.float64), atol=1e-10)
            assert mask.sum() == len(drawn)
            assert bool(rollout.truncated[p, g]) == (drawn[-1] not in eos)
            assert rollout.texts[p][g] == tokenizer.decode(drawn, skip_special_tokens=True)
            ended += drawn[-1] in eos
    assert 0 < ended < 12, "the case must hold both completions that end and ones that are cut off"


def test_what_is_drawn_depends_on_seed_and_position_alone(policy, tokenizer) -> None:
    sampler, prompts = InProcessSampler(max_new_tokens=8), batch(tokenizer, TEXTS)
    torch.manual_seed(1)
    whole = sampler.sample(policy, tokenizer, prompts, group_size=4, seed=0)
    torch.manual_seed(2)
    alone = sampler.sample(policy, tokenizer, batch(tokenizer, TEXTS[1:2], first=1), group_size=4, seed=0)
    assert alone.texts[0] == whole.texts[1]
    assert sampler.sample(policy, tokenizer, prompts, group_size=4, seed=1).texts != whole.texts
    moved = replace(prompts, position=prompts.position + 100)
    assert sampler.sample(policy, tokenizer, moved, group_size=4, seed=0).texts != whole.texts


def test_frequencies_follow_the_policy(policy, tokenizer) -> None:
    prompts = batch(tokenizer, TEXTS[:1])
    rollout = InProcessSampler(max_new_tokens=1).sample(policy, tokenizer, prompts, group_size=4000, seed=0)
    expected = policy(prompts.input_ids).logits[0, -1].softmax(-1)
    seen = torch.bincount(rollout.completion_ids.flatten(), minlength=len(expected)) / 4000
    assert (seen - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_a_finished_sequence_leaves_the_batch(policy, tokenizer) -> None:
    rows: list[int] = []
    hook = policy.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        rollout = InProcessSampler(max_new_tokens=12).sample(
            policy, tokenizer, batch(tokenizer, TEXTS), group_size=4, seed=3
        )
    finally:
        hook.remove()
    assert rows[0] == len(TEXTS), "each prompt is computed once for its group"
    alive = [int((rollout.mask.sum(-1) > t).sum()) for t in range(1, rollout.mask.shape[-1])]
    assert rows[1:] == alive
    assert alive[-1] < 12


def test_greedy_takes_the_most_probable_token(policy, tokenizer) -> None:
    sampler, prompts = InProcessSampler(max_new_tokens=5, temperature=0), batch(tokenizer, TEXTS)
    rollout = sampler.sample(policy, tokenizer, prompts, group_size=2, seed=0)
    assert all(first == second for first, second in rollout.texts)
    logits = policy(prompts.input_ids, attention_mask=prompts.mask.long()).logits[0, -1]
    assert rollout.completion_ids[0, 0, 0] == logits.argmax()


def test_leaves_the_model_in_its_mode(policy, tokenizer) -> None:
    for training in (True, False):
        policy.train(training)
        InProcessSampler(max_new_tokens=1).sample(policy, tokenizer, batch(tokenizer, TEXTS), group_size=2, seed=0)
        assert policy.training is training
    policy.eval()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected at least 0"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"top_k": 0}, "top_k: got 0, expected at least 1; null"),
        ({"max_sequences": 0}, "max_sequences: got 0, expected at least 1"),
    ],
)
def test_refuses(arguments, named) -> None:
    with pytest.raises(ValueError, match=named):
        InProcessSampler(**arguments)
