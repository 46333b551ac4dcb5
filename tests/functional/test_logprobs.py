"""Log-probabilities of tokens and exact KL from logits, in chunks."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from frpo.functional import logprobs
from frpo.functional.kl import full_kl
from frpo.functional.logprobs import token_full_kl, token_logprobs

V = 7


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 4, 5, 1024])
def chunk(request, monkeypatch) -> int:
    """Chunks that divide the positions, that do not, of one, and of all."""
    monkeypatch.setattr(logprobs, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_probabilities_agree_with_loops(chunk, temperature):
    x, tokens = logits(0, 3, 4), ids(1, 3, 4)
    got = token_logprobs(x, tokens, temperature=temperature)
    assert got.shape == (3, 4)
    for i in range(3):
        for t in range(4):
            row = oracles.log_softmax([v / temperature for v in x[i, t].tolist()])
            assert got[i, t].item() == pytest.approx(row[tokens[i, t]], abs=1e-12)


def test_gradients_do_not_depend_on_the_chunks(chunk):
    x, tokens = logits(2, 3, 4).requires_grad_(), ids(3, 3, 4)
    (got,) = torch.autograd.grad(token_logprobs(x, tokens, temperature=0.7).square().sum(), x)
    plain = (x / 0.7).log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (None, 0.8), (4, 0.7)])
def test_the_truncated_distribution_is_a_distribution(chunk, top_k, top_p):
    """Over the tokens the sampler can draw, the probabilities sum to one."""
    x = logits(4, 3)
    rows = x.log_softmax(-1).tolist()
    for row, kept in zip(rows, kept_tokens(rows, top_k, top_p), strict=True):
        mass = sum(math.exp(row[v]) for v in kept)
        tokens = torch.tensor(sorted(kept))
        repeated = torch.tensor(row, dtype=torch.float64).expand(len(kept), V)
        got = token_logprobs(repeated, tokens, top_k=top_k, top_p=top_p)
        assert got.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
        expected = [row[v] - math.log(mass) for v in sorted(kept)]
        assert got.tolist() == pytest.approx(expected, abs=1e-12)


def kept_tokens(rows: list[list[float]], top_k: int | None, top_p: float) -> list[set[int]]:
    """The k most probable tokens, then the fewest of them that reach the mass ``top_p`` of what is left."""
    sets = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda v: -row[v])[: top_k or len(row)]
        whole = sum(math.exp(row[v]) for v in order)
        kept, mass = set(), 0.0
        for v in order:
            kept.add(v)
            mass += math.exp(row[v]) / whole
            if mass >= top_p:
                break
        sets.append(kept)
    return sets


def test_a_drawn_token_outside_the_nucleus_has_a_finite_log_probability():
    x = torch.tensor([[5.0, 0.0, -5.0]], requires_grad=True)
    value = token_logprobs(x, torch.tensor([2]), top_p=0.5)
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_give_float32(dtype):
    x, tokens = logits(5, 6).to(dtype), ids(6, 6)
    got = token_logprobs(x, tokens)
    assert got.dtype == torch.float32
    expected = x.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    assert token_full_kl(x, x).dtype == torch.float32


def test_huge_logits_do_not_overflow():
    x = torch.tensor([[1e4, 0.0, -1e4]])
    got = token_logprobs(x.expand(3, 3), torch.arange(3))
    assert got.tolist() == pytest.approx([0.0, -1e4, -2e4], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_full_kl_of_tokens_is_the_full_kl_at_the_temperature(chunk, temperature):
    x, reference = logits(7, 2, 5).requires_grad_(), logits(8, 2, 5)
    got = token_full_kl(x, reference, temperature=temperature)
    expected = full_kl(x / temperature, reference / temperature)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match=r"token_logprobs.*\(2, 3, 7\).*\(2, 4\)"):
        token_logprobs(logits(0, 2, 3), ids(0, 2, 4))
    with pytest.raises(ValueError, match=r"token_full_kl.*\(2, 3, 7\).*\(2, 4, 7\)"):
        token_full_kl(logits(0, 2, 3), logits(0, 2, 4))
