"""Models without weights have the names, shapes and dtypes of the loaded ones."""

from __future__ import annotations

import pytest
import torch
from runs import Graded

from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled, FrozenCopy, NamedAdapter, Reference
from frpo.models.scorer import Scorer
from frpo.plan.blank import BlankModel, blank_base, blank_models, blank_policy, blank_reference, blank_scorer
from frpo.plan.plan import size, trainable, weights
from frpo.rewards.compose import Complement, WeightedSum
from frpo.rewards.judges.causal_judge import CausalJudge
from frpo.rewards.model import RewardModel
from frpo.rewards.placement import OnRanks
from frpo.rewards.router import Router
from frpo.rewards.rules import RefusalPhrases
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
    blank, loaded = blank_policy(policy), policy.load()
    assert shapes(blank) == shapes(loaded)
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    assert weights(blank) == weights(loaded)
    assert blank.training
    assert any(getattr(m, "gradient_checkpointing", False) for m in blank.modules())


def test_the_tiny_policy_is_planned_without_pre_training(tmp_path):
    blank = blank_policy(TinyPolicy(cache_dir=str(tmp_path / "cache")))
    assert sum(p.numel() for p in blank.parameters()) == 119_808
    assert not (tmp_path / "cache").exists()


def test_references_add_what_they_add_when_loaded(model_dir, adapter_dir):
    policy = Policy(str(model_dir), adapter=LoRA(r=4, alpha=8))
    for reference in (AdapterDisabled(), FrozenCopy(), NamedAdapter(adapter_dir)):
        blank, loaded = blank_policy(policy), policy.load()
        frozen, expected = blank_reference(reference, policy, blank), reference.load(policy, loaded)
        assert shapes(blank) == shapes(loaded), reference
        assert (frozen is None) == (expected is None)
        if frozen is not None:
            assert shapes(frozen) == shapes(expected)


def test_a_blank_scorer_is_the_loaded_one(model_dir):
    scorer = Scorer(Policy(str(model_dir), adapter=LoRA(r=4, alpha=8)), max_length=32)
    assert shapes(blank_scorer(scorer)) == shapes(scorer.load())


class AskedOnce(CausalJudge):
    """A judge of one question."""

    cut_side, markers = "right", ()

    def templates(self):
        return ("{response}",)

    def question(self, request, response, fields):
        return response

    def find_tokens(self, tokenizer):
        pass

    def read(self, logits):
        raise NotImplementedError


@pytest.fixture
def scorer_dir(model_dir, tmp_path):
    scorer = Scorer(Policy(str(model_dir)), max_length=32)
    for part in (scorer.load(), scorer.tokenizer):
        part.save_pretrained(tmp_path / "scorer")
    return str(tmp_path / "scorer")


def test_the_models_of_rewards_are_the_loaded_ones(scorer_dir, model_dir):
    for reward, tokens in ((RewardModel(scorer_dir, batch_size=3), 32), (AskedOnce(str(model_dir), max_length=24), 24)):
        (blank,) = blank_models(reward)
        reward.setup(torch.device("cpu"))
        assert shapes(blank.model) == shapes(reward._model)
        assert {p.device.type for p in blank.model.parameters()} == {"meta"}
        assert (blank.name, blank.rows, blank.tokens) == (reward.path, reward.batch_size, tokens)


def test_rewards_made_of_rewards_load_what_their_parts_do(scorer_dir):
    def model(rows):
        return RewardModel(scorer_dir, batch_size=rows)

    rule = RefusalPhrases()
    mixed = WeightedSum({"a": model(1), "rule": rule, "b": Complement(model(2))}, {"a": 1.0, "rule": 1.0, "b": 1.0})
    routed = Router({"safety": mixed, "maths": rule}, default=OnRanks(model(3), ranks=[0]))
    assert [blank.rows for blank in blank_models(routed)] == [1, 2, 3]


def test_classes_of_the_user_are_planned_where_they_are_registered(model_dir):
    class Own(Graded):
        pass

    class OwnReference(Reference):
        load = active = starts_at_policy = None

    assert blank_models(Own()) == []
    policy = Policy(str(model_dir))
    with pytest.raises(ValueError, match="reference OwnReference: .*blank_reference.register"):
        blank_reference(OwnReference(), policy, None)
    blank_models.register(Own, lambda reward: [BlankModel("own", blank_base(policy), 1, 8)])
    blank_reference.register(OwnReference, lambda reference, policy, model: blank_base(policy))
    assert [blank.name for blank in blank_models(Complement(Own()))] == ["own"]
    assert shapes(blank_reference(OwnReference(), policy, None)) == shapes(blank_base(policy))


def test_tied_weights_count_once(model_dir):
    blank = blank_policy(Policy(str(model_dir)))
    embedding = blank.get_input_embeddings().weight
    assert size([embedding, blank.lm_head.weight]) == embedding.numel() * 4
    assert len(trainable(blank)) == len(list(blank.parameters()))


def test_a_path_that_is_no_model_is_answered(tmp_path):
    with pytest.raises(ValueError, match="expected the configuration of a causal language model"):
        blank_policy(Policy(str(tmp_path)))
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
