"""Policies load, train what they should, and refuse what cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from toy_models import CHAT_TEMPLATE

from frpo.models.checkpoint import build_policy
from frpo.models.export import export_policy
from frpo.models.policy import LoRA, Policy, trainable_names
from frpo.models.reference import FrozenCopy, NamedAdapter


def changed_tokenizer(model_dir: Path, tmp_path: Path, **changes) -> Path:
    """A copy of the model whose tokenizer_config.json has entries changed, or removed where None."""
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    file = copy / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return copy


def test_trains_everything_or_the_adapter(model_dir: Path) -> None:
    full = Policy(str(model_dir)).load()
    assert trainable_names(full) == {name for name, _ in full.named_parameters()}
    lora = Policy(str(model_dir), adapter=LoRA(r=2, target_modules=["q_proj"])).load()
    assert len(trainable_names(lora)) == 4
    assert all(".q_proj.lora_" in name for name in trainable_names(lora))


def test_dropout_is_off(model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = Policy(str(copy)).load()
    ids = torch.tensor([[3, 7, 8, 4]])
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_of_a_loaded_adapter_is_off(model_dir: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(Policy(str(model_dir)).load_base(), config).save_pretrained(tmp_path / "adapter")
    policy = Policy(str(model_dir), adapter=LoRA(path=str(tmp_path / "adapter")))
    model = policy.load()
    ids = torch.tensor([[3, 7, 8, 4]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    NamedAdapter(str(tmp_path / "adapter")).load(policy, model)
    model.set_adapter("reference")
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_dropout_of_an_adapter_is_the_one_asked_for_and_falls_on_it_alone(model_dir: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 7, 8, 4]])
    first = Policy(str(model_dir), adapter=LoRA(r=2, dropout=0.5)).load()
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(first(ids).logits, first(ids).logits)
    assert torch.equal(first.eval()(ids).logits, first(ids).logits)
    first.save_pretrained(tmp_path / "adapter")
    for dropout in (0.0, 0.5):
        second = Policy(str(model_dir), adapter=LoRA(path=str(tmp_path / "adapter"), dropout=dropout)).load()
        assert torch.equal(second(ids).logits, second(ids).logits) == (dropout == 0)
        with second.disable_adapter():
            assert torch.equal(second(ids).logits, second(ids).logits)
    with pytest.raises(ValueError, match="LoRA.dropout: got 1"):
        LoRA(dropout=1.0)


def test_a_padding_token_is_named_where_there_is_none(model_dir: Path, tmp_path: Path) -> None:
    copy = changed_tokenizer(model_dir, tmp_path, pad_token=None)
    assert Policy(str(copy), pad_token="<unk>").tokenizer.pad_token_id == 2
    with pytest.raises(ValueError, match="pad_token: got '<nope>'"):
        _ = Policy(str(copy), pad_token="<nope>").tokenizer


def test_the_tokenizer_of_another_directory(model_dir: Path, tmp_path: Path) -> None:
    weights, words = tmp_path / "weights", tmp_path / "words"
    shutil.copytree(model_dir, weights)
    words.mkdir()
    for file in weights.glob("*token*"):
        file.rename(words / file.name)
    for file in weights.glob("chat_template*"):
        file.rename(words / file.name)
    policy = Policy(str(weights), revision="of the weights alone", tokenizer_path=str(words))
    expected = Policy(str(model_dir)).tokenizer
    assert policy.tokenizer.get_vocab() == expected.get_vocab()
    assert policy.tokenizer.chat_template == expected.chat_template
    again = build_policy(policy.description())
    assert again.description() == policy.description()
    assert again.tokenizer.get_vocab() == expected.get_vocab()
    export_policy(Policy(str(weights)).load(), again.tokenizer, tmp_path / "out")
    assert Policy(str(tmp_path / "out")).tokenizer.get_vocab() == expected.get_vocab()
    with pytest.raises(ValueError, match=r"Policy.tokenizer_path: got .*none.*expected a tokenizer"):
        _ = Policy(str(model_dir), tokenizer_path=str(tmp_path / "none")).tokenizer


def test_dtype_and_chat_template(model_dir: Path, tmp_path: Path) -> None:
    assert Policy(str(model_dir), dtype="bfloat16").load().dtype == torch.bfloat16
    given = Policy(str(model_dir), chat_template="{{ messages[0]['content'] }}").tokenizer
    assert given.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"
    file = tmp_path / "template.jinja"
    file.write_text(CHAT_TEMPLATE)
    assert Policy(str(model_dir), chat_template=str(file)).tokenizer.chat_template == CHAT_TEMPLATE


def test_adapter_starts_from_a_directory(model_dir: Path, tmp_path: Path) -> None:
    first = Policy(str(model_dir), adapter=LoRA(r=2)).load()
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    first.save_pretrained(tmp_path / "adapter")
    second = Policy(str(model_dir), adapter=LoRA(path=str(tmp_path / "adapter"))).load()
    ids = torch.tensor([[3, 7, 8, 4]])
    assert torch.equal(first.eval()(ids).logits, second.eval()(ids).logits)
    assert trainable_names(second) == trainable_names(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eos_token": None}, "has no end-of-sequence token.*set `eos_token`"),
        ({"pad_token": None}, "has no padding token.*set `pad_token`"),
    ],
)
def test_refuses_a_tokenizer_without(model_dir: Path, tmp_path: Path, change, named: str) -> None:
    copy = changed_tokenizer(model_dir, tmp_path, **change)
    with pytest.raises(ValueError, match=named):
        _ = Policy(str(copy)).tokenizer


@pytest.mark.parametrize("read", [lambda p: p.tokenizer, lambda p: p.load()], ids=["tokenizer", "load"])
def test_refuses_a_path_with_no_model(tmp_path: Path, read) -> None:
    with pytest.raises(ValueError, match=r"Policy.path: got .*a directory here.*frpo import-model"):
        read(Policy(str(tmp_path)))
    with pytest.raises(ValueError, match="neither a directory here nor a hub id"):
        read(Policy(str(tmp_path / "nowhere")))


def test_refuses_weights_that_are_not_safetensors(model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    (copy / "model.safetensors").unlink()
    torch.save(Policy(str(model_dir)).load().state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="in safetensors"):
        Policy(str(copy)).load()


def test_refuses_bad_arguments(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'float8'"):
        Policy(str(model_dir), dtype="float8")
    with pytest.raises(ValueError, match="LoRA.r: got 0"):
        LoRA(r=0)
    with pytest.raises(FileNotFoundError, match="LoRA.path"):
        Policy(str(model_dir), adapter=LoRA(path=str(tmp_path))).load()
    with pytest.raises(FileNotFoundError, match="chat_template"):
        _ = Policy(str(model_dir), chat_template=str(tmp_path / "none.jinja")).tokenizer
    policy = Policy(str(model_dir), adapter=LoRA(r=2))
    with pytest.raises(FileNotFoundError, match="NamedAdapter.path"):
        NamedAdapter(str(tmp_path)).load(policy, policy.load())


def test_refuses_a_reference_of_another_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    policy = Policy(str(model_dir))
    model = policy.load()
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary of 50, the policy one of 46"):
        FrozenCopy(str(tmp_path / "other")).load(policy, policy.load())


def test_its_description_builds_it_again(model_dir: Path) -> None:
    from frpo.tiny.policy import TinyPolicy

    for policy in (Policy(str(model_dir), adapter=LoRA(r=2), dtype="bfloat16"), TinyPolicy(seed=3)):
        description = policy.description()
        assert json.loads(json.dumps(description)) == description
        arguments = dict(description["init_args"])
        if arguments["adapter"] is not None:
            arguments["adapter"] = LoRA(**arguments["adapter"])
        again = type(policy)(**arguments)
        assert again.description() == description
        assert again.path == policy.path
