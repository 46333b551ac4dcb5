"""Models without weights have the names, shapes and dtypes of the loaded ones."""

from __future__ import annotations

import pytest
import torch

from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled, FrozenCopy, NamedAdapter
from frpo.models.scorer import Scorer
from frpo.plan.plan import size, trainable, weights
from frpo.tiny.policy import TinyPolicy


def shapes(model) -> dict[str, tuple]:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.fixture
def adapter_dir(model_dir, tmp_path):
    Policy(str(model_dir), adapter=LoRA(r=3, alpha=6)).load().save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4, alpha=8), "path"])
def test_a_blank_policy_is_the_loaded_one_without_its_weights(model_dir, adapter_dir, dtype, adapter):
    adapter = LoRA(path=adapter_dir) if adapter == "path" else adapter
    policy = Policy(str(model_dir), adapter=adapter, dtype=dtype, gradient_checkpointing=True)
    blank, loaded = policy.blank(), policy.load()
    assert shapes(blank) == shapes(loaded)
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    assert weights(blank) == weights(loaded)
    assert blank.training
    assert any(getattr(m, "gradient_checkpointing", False) for m in blank.modules())


def test_the_tiny_policy_is_planned_without_pre_training(tmp_path):
    blank = TinyPolicy(cache_dir=str(tmp_path / "cache")).blank()
    assert sum(p.numel() for p in blank.parameters()) == 119_808
    assert not (tmp_path / "cache").exists()


def test_references_add_what_they_add_when_loaded(model_dir, adapter_dir):
    policy = Policy(str(model_dir), adapter=LoRA(r=4, alpha=8))
    for reference in (AdapterDisabled(), FrozenCopy(), NamedAdapter(adapter_dir)):
        blank, loaded = policy.blank(), policy.load()
        frozen, expected = reference.blank(policy, blank), reference.load(policy, loaded)
        assert shapes(blank) == shapes(loaded), reference
        assert (frozen is None) == (expected is None)
        if frozen is not None:
            assert shapes(frozen) == shapes(expected)


def test_a_blank_scorer_is_the_loaded_one(model_dir):
    scorer = Scorer(Policy(str(model_dir), adapter=LoRA(r=4, alpha=8)), max_length=32)
    assert shapes(scorer.blank()) == shapes(scorer.load())


def test_tied_weights_count_once(model_dir):
    blank = Policy(str(model_dir)).blank()
    embedding = blank.get_input_embeddings().weight
    assert size([embedding, blank.lm_head.weight]) == embedding.numel() * 4
    assert len(trainable(blank)) == len(list(blank.parameters()))


def test_a_path_that_is_no_model_is_answered(tmp_path):
    with pytest.raises(ValueError, match="expected the configuration of a causal language model"):
        Policy(str(tmp_path)).blank()
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
