"""A real, tiny, random sequence classifier: batches, padding, templates, truncation, refusals."""

import copy
import hashlib
import math

import pytest
import torch
from reward_cases import completion
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from frpo.rewards.base import JudgeIdentity
from frpo.rewards.compose import WeightedSum
from frpo.rewards.model import RewardModel
from frpo.types import Completion, Prompt

CPU = torch.device("cpu")
TEXTS = ["w1", "w2 w3 w4", "w5 w6 w7 w8 w9 w10 w11 w12", "w3", "w13 w14", ""]


def save_classifier(path, tokenizer, outputs=1, pad=True):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_labels=outputs,
        pad_token_id=tokenizer.pad_token_id if pad else None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def scorer_dir(tmp_path_factory, tokenizer):
    return save_classifier(tmp_path_factory.mktemp("scorer"), tokenizer)


@pytest.fixture(scope="module")
def three_way_dir(tmp_path_factory, tokenizer):
    return save_classifier(tmp_path_factory.mktemp("three_way"), tokenizer, outputs=3)


def ready(path, **settings):
    reward = RewardModel(str(path), **{"max_length": 64, **settings})
    reward.setup(CPU)
    return reward


def values(reward, texts=TEXTS, **row):
    judgements = reward([completion(text, **{"prompt": "w0", **row}) for text in texts])
    assert [j.status for j in judgements] == ["value"] * len(texts), judgements
    return [j.value for j in judgements]


def by_hand(path, text, prompt="w0"):
    """One forward pass of the classifier on the conversation written out."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    ids = tokenizer(f"<user> {prompt} <assistant> {text} ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


def test_scores_are_those_of_the_model(scorer_dir):
    expected = [by_hand(scorer_dir, text).item() for text in TEXTS]
    assert len({round(e, 4) for e in expected}) == len(TEXTS), "the cases tell the texts apart"
    assert values(ready(scorer_dir)) == pytest.approx(expected, abs=1e-5)


def test_it_is_identified_by_model_revision_and_template(scorer_dir, tokenizer, tmp_path):
    assert RewardModel("some/model", revision="2").identity() == JudgeIdentity("some/model", "2")
    digest = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:16]
    assert ready(scorer_dir).identity() == JudgeIdentity(str(scorer_dir), None, digest)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert ready(save_classifier(tmp_path, plain)).identity().template_hash is None


@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_padding_does_not_change_scores(scorer_dir, batch_size):
    alone = values(ready(scorer_dir, batch_size=1))
    assert values(ready(scorer_dir, batch_size=batch_size)) == pytest.approx(alone, abs=1e-5)


def test_padding_does_not_change_the_scores_of_an_encoder(tmp_path, tokenizer):
    """Every position of an encoder sees every other, so padding that is not masked would show."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    alone = values(ready(tmp_path, batch_size=1))
    assert len({round(value, 4) for value in alone}) == len(TEXTS)
    assert values(ready(tmp_path, batch_size=4)) == pytest.approx(alone, abs=1e-5)


def test_the_order_is_the_callers(scorer_dir):
    reward = ready(scorer_dir, batch_size=2)
    assert values(reward, TEXTS[::-1]) == pytest.approx(values(reward)[::-1], abs=1e-5)
    assert reward([]) == []


def test_the_models_own_pad_token_wins(tmp_path, tokenizer):
    """The tokenizer pads with another token than the model was configured for: rows must not depend on it."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = "w39"
    save_classifier(tmp_path, tokenizer)
    other.save_pretrained(tmp_path)
    texts = ["w39", "w1 w2 w39 w39", "w1 w2 w3 w4 w5"]
    alone = values(ready(tmp_path, batch_size=1), texts)
    assert values(ready(tmp_path, batch_size=3), texts) == pytest.approx(alone, abs=1e-5)


def test_a_model_without_pad_token_takes_the_tokenizers(tmp_path, tokenizer):
    save_classifier(tmp_path, tokenizer, pad=False)
    assert values(ready(tmp_path, batch_size=4)) == pytest.approx(values(ready(tmp_path, batch_size=1)), abs=1e-5)


def test_no_pad_token_at_all_needs_batch_size_one(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    save_classifier(tmp_path, bare, pad=False)
    with pytest.raises(ValueError, match=r"without padding token .* write `batch_size: 1`"):
        ready(tmp_path)
    assert values(ready(tmp_path, batch_size=1)) == pytest.approx(
        [by_hand(tmp_path, text).item() for text in TEXTS], abs=1e-5
    )


def test_two_outputs_are_refused_before_the_weights_are_read(tmp_path, tokenizer):
    save_classifier(tmp_path, tokenizer, outputs=2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"got 2 outputs in .*, expected 1.*Write `label: <index>`, 0 to 1"):
        ready(tmp_path)


def test_a_label_scores_by_log_odds_and_sigmoid_makes_it_the_probability(three_way_dir):
    logits = torch.stack([by_hand(three_way_dir, text) for text in TEXTS])
    probability = logits.softmax(-1)[:, 2]
    assert values(ready(three_way_dir, label=2)) == pytest.approx(probability.logit().tolist(), abs=1e-4)
    assert values(ready(three_way_dir, label=2, transform="sigmoid")) == pytest.approx(probability.tolist(), abs=1e-5)


def test_labels_out_of_place_are_refused(scorer_dir, three_way_dir):
    with pytest.raises(ValueError, match=r"label: got 3 .* expected an index from 0 to 2"):
        ready(three_way_dir, label=3)
    with pytest.raises(ValueError, match=r"label: got 0 .* 1 output.* leave it out"):
        ready(scorer_dir, label=0)


def test_a_language_model_has_no_scores_to_give(model_dir):
    with pytest.raises(ValueError, match=r"holds no weights for \['score.weight'\].*judgements would be random"):
        ready(model_dir, label=1)


def test_transform_comes_after_scale_and_shift(scorer_dir):
    raw = values(ready(scorer_dir))
    assert values(ready(scorer_dir, scale=2.0, shift=-1.0)) == pytest.approx([2 * r - 1 for r in raw], abs=1e-5)
    squashed = [1 / (1 + math.exp(1 - 2 * r)) for r in raw]
    assert values(ready(scorer_dir, scale=2.0, shift=-1.0, transform="sigmoid")) == pytest.approx(squashed, abs=1e-5)


def test_all_messages_of_the_prompt_are_read(scorer_dir):
    turns = ({"role": "system", "content": "w7"}, {"role": "user", "content": "w8"})
    row = Completion(Prompt("0", turns, "t"), prompt_text="never read here", text="w9")
    alone = Completion(Prompt("0", turns[1:], "t"), prompt_text="never read here", text="w9")
    with_system, without = (j.value for j in ready(scorer_dir)([row, alone]))
    assert without == pytest.approx(by_hand(scorer_dir, "w9", prompt="w8").item(), abs=1e-5)
    assert abs(with_system - without) > 1e-3


def test_without_a_chat_template_the_prompt_is_read_as_the_policy_did(tmp_path, scorer_dir, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    save_classifier(tmp_path, plain)
    row = Completion(Prompt("0", ({"role": "user", "content": "w1"},), "t"), "<user> w0 <assistant> ", "w2 w3")
    (judgement,) = ready(tmp_path)([row])
    assert judgement.value == pytest.approx(by_hand(scorer_dir, "w2 w3").item(), abs=1e-5)


def test_a_completion_cannot_spell_special_tokens(scorer_dir, tokenizer):
    reward = ready(scorer_dir)
    ids = reward.encode(completion("w1 <eos> <pad> w2", prompt="w0 <eos>"))
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer("<eos>")["input_ids"] == [tokenizer.eos_token_id], "spelled out, it would have been one"


def test_a_long_prompt_loses_its_oldest_tokens(scorer_dir):
    prompt = " ".join(f"w{i}" for i in range(30))
    reward = ready(scorer_dir, max_length=8)
    whole = ready(scorer_dir).encode(completion("w1 w2", prompt=prompt))
    assert reward.encode(completion("w1 w2", prompt=prompt)) == whole[-8:]
    assert values(reward, ["w1 w2"], prompt=prompt) == values(reward, ["w1 w2"], prompt="w39 " + prompt)


def test_the_first_token_stays_where_it_begins_the_sequence(tmp_path, tokenizer):
    begun = copy.deepcopy(tokenizer)
    begun.bos_token = "w38"
    begun.chat_template = "w38 " + begun.chat_template
    save_classifier(tmp_path, begun)
    prompt = " ".join(f"w{i}" for i in range(30))
    ids = ready(tmp_path, max_length=8).encode(completion("w1 w2", prompt=prompt))
    assert ids[0] == begun.convert_tokens_to_ids("w38")
    assert ids[1:] == ready(tmp_path).encode(completion("w1 w2", prompt=prompt))[-7:]


def test_the_tokenizers_special_tokens_are_left_to_the_template(tmp_path, tokenizer):
    closing = copy.deepcopy(tokenizer)
    pair = ("<eos>", closing.eos_token_id)
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[pair])
    save_classifier(tmp_path, closing)
    just_fits, too_long = ready(tmp_path, max_length=8)([completion("w1 " * 8), completion("w1 " * 9)])
    assert (just_fits.status, too_long.status) == ("value", "failed")
    assert closing.eos_token_id not in ready(tmp_path).encode(completion("w1")), "the template has written them all"


def test_a_completion_that_does_not_fit_fails_and_spares_the_others(scorer_dir):
    reward = ready(scorer_dir, max_length=8)
    long, short = reward([completion("w1 " * 9, prompt="w0"), completion("w2", prompt="w0")])
    assert (long.status, long.reason) == ("failed", "completion over max_length=8 tokens")
    assert short.value == pytest.approx(by_hand(scorer_dir, "w2").item(), abs=1e-5)


def test_a_score_that_is_not_finite_fails(scorer_dir):
    reward = ready(scorer_dir)
    with torch.no_grad():
        reward._model.get_input_embeddings().weight[reward._encoder.tokenizer.convert_tokens_to_ids("w5")] = math.nan
    bad, good = reward([completion("w5", prompt="w0"), completion("w6", prompt="w0")])
    assert (bad.status, bad.reason) == ("failed", "reward model gave nan")
    assert good.status == "value"


def test_an_infinite_score_fails_even_where_a_sigmoid_hides_it(scorer_dir, monkeypatch):
    reward = ready(scorer_dir, transform="sigmoid")
    monkeypatch.setattr(reward, "_raw", lambda logits: torch.tensor([math.inf, -math.inf, 0.0]))
    assert [j.status for j in reward([completion("w1")] * 3)] == ["failed", "failed", "value"]


def test_scores_are_float32_under_autocast(scorer_dir):
    reward = ready(scorer_dir)
    expected = values(reward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert values(reward) == expected


def test_half_precision_weights_are_near(scorer_dir):
    exact, rough = values(ready(scorer_dir)), values(ready(scorer_dir, dtype="bfloat16"))
    assert rough == pytest.approx(exact, abs=0.1)
    assert rough != exact


def test_the_model_is_frozen_and_stays_out_of_the_module_that_holds_it(scorer_dir):
    class Holder(torch.nn.Module):
        def __init__(self, reward):
            super().__init__()
            self.reward = reward

    reward = ready(scorer_dir)
    holder = Holder(WeightedSum({"model": reward}, {"model": 1.0}))
    values(reward)
    assert list(holder.parameters()) == []
    assert dict(holder.state_dict()) == {}
    assert not reward._model.training
    assert not any(p.requires_grad for p in reward._model.parameters())


def test_nothing_is_loaded_before_setup_and_once_after():
    reward = RewardModel("no/such/directory")
    with pytest.raises(RuntimeError, match=r"before setup\(device\)"):
        reward([completion("w1")])


def test_setup_again_keeps_the_model(scorer_dir):
    reward = ready(scorer_dir)
    model = reward._model
    reward.setup(CPU)
    assert reward._model is model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, r"dtype: got 'int8', expected one of float32, bfloat16, float16"),
        ({"transform": "tanh"}, r"transform: got 'tanh', expected one of identity, sigmoid"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"max_length": 0}, "max_length: got 0, expected at least 1"),
        ({"scale": 0.0}, "scale: got 0"),
        ({"scale": math.nan}, "scale: got nan"),
        ({"shift": math.inf}, "shift: got inf"),
        ({"label": -1}, "label: got -1"),
    ],
)
def test_bad_settings_say_what_to_write(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModel("path", **settings)


def test_more_tokens_than_positions_are_refused(scorer_dir):
    with pytest.raises(ValueError, match=r"max_length: got 65, expected at most the 64 positions"):
        ready(scorer_dir, max_length=65)
