"""Export: what is written reads back as the policy, and nothing is written where it would not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from frpo.__main__ import main as frpo
from frpo.models import export, saving
from frpo.models.checkpoint import load_policy, load_trained, read_checkpoint
from frpo.models.export import export_policy
from frpo.models.policy import LoRA, Policy, trainable_names

IDS = torch.tensor([[6, 7, 8, 9, 3, 20, 41, 45]])


def main(args: list[str]) -> int:
    return frpo(["export", *args])


@pytest.fixture(scope="module")
def wide_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two key-value heads more: the same names, other shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("wide") / "policy"
    shutil.copytree(model_dir, path)
    config = AutoConfig.from_pretrained(model_dir)
    config.num_key_value_heads = 4
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def trained(policy: Policy) -> nn.Module:
    """The policy's model after a fake training that moved every trainable weight."""
    model = policy.load()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def write_run(folder: Path, path: Path, lora: bool, model: nn.Module, where: str = "checkpoint") -> Path:
    """A run's folder with one checkpoint; the policy is described in the checkpoint or in config.yaml."""
    init_args = {"path": str(path), "adapter": {"r": 4, "alpha": 8} if lora else None}
    description = {"class_path": "frpo.models.policy.Policy", "init_args": init_args}
    names = trainable_names(model)
    checkpoint = {
        "state_dict": {f"policy_model.{n}": p.detach() for n, p in model.named_parameters() if n in names},
        "global_step": 7,
        "optimizer_states": [],
    }
    if where == "checkpoint":
        checkpoint["frpo"] = {"policy": description}
    ckpt = folder / "checkpoints" / "last.ckpt"
    ckpt.parent.mkdir(parents=True)
    torch.save(checkpoint, ckpt)
    if where == "config":
        config = {"model": {"class_path": "m.M", "init_args": {"policy": description}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ckpt


def policy_of(path: Path, lora: bool) -> Policy:
    return Policy(str(path), adapter=LoRA(r=4, alpha=8) if lora else None)


def reload(out: Path, adapter: bool) -> nn.Module:
    if adapter:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(out)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("where", ["checkpoint", "config"])
@pytest.mark.parametrize(
    ("lora", "merge", "kind"), [(False, False, "full"), (True, False, "adapter"), (True, True, "merged")]
)
def test_the_command_writes_a_directory_that_is_the_policy(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, lora: bool, merge: bool, kind: str, where: str
) -> None:
    model = trained(policy_of(model_dir, lora))
    ckpt = write_run(tmp_path / "run", model_dir, lora, model, where)
    out = tmp_path / "made" / "here"
    assert main(["--ckpt_path", str(ckpt), "--out", str(out), *(["--merge"] if merge else [])]) == 0
    assert kind in capsys.readouterr().out
    again = reload(out, adapter=kind == "adapter")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(again), logits(Policy(str(model_dir)).load()), atol=1e-2)
    assert Policy(str(out) if kind != "adapter" else str(model_dir)).tokenizer.get_vocab()
    record = json.loads((out / "frpo_export.json").read_text())
    assert (record["kind"], record["checkpoint"], record["step"]) == (kind, "last.ckpt", 7)
    assert str(tmp_path) not in (out / "frpo_export.json").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["here"]


def test_a_directory_holds_safetensors_tokenizer_and_generation_config(model_dir: Path, tmp_path: Path) -> None:
    policy = policy_of(model_dir, lora=False)
    report = export_policy(trained(policy), policy.tokenizer, tmp_path / "out")
    names = {path.name for path in report.directory.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "frpo_export.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", "README.md"))]
    assert report.size == sum(path.stat().st_size for path in report.directory.iterdir()) > 4 * report.parameters
    modes = {path.stat().st_mode & 0o777 for path in report.directory.iterdir()}
    assert modes == {report.directory.stat().st_mode & 0o666}


def test_an_adapter_directory_is_small_and_names_its_base(model_dir: Path, tmp_path: Path) -> None:
    policy = policy_of(model_dir, lora=True)
    report = export_policy(trained(policy), policy.tokenizer, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert sum(weight.numel() for weight in weights.values()) == report.parameters
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("lora", "merge"), [(False, False), (True, False), (True, True)])
def test_weights_are_stored_in_the_type_asked_for(
    model_dir: Path, tmp_path: Path, dtype: str, lora: bool, merge: bool
) -> None:
    policy = policy_of(model_dir, lora)
    model = trained(policy)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = export_policy(model, policy.tokenizer, tmp_path / "out", merge=merge, dtype=dtype)
    file = "adapter_model.safetensors" if lora and not merge else "model.safetensors"
    assert {weight.dtype for weight in load_file(report.directory / file).values()} == {export.DTYPES[dtype]}
    if file == "model.safetensors":
        assert json.loads((report.directory / "config.json").read_text())["dtype"] == dtype
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_update_too_small_for_bfloat16_survives_a_merge(model_dir: Path, tmp_path: Path) -> None:
    policy = Policy(str(model_dir), adapter=LoRA(r=4, alpha=8, target_modules=["q_proj"]), dtype="bfloat16")
    model = policy.load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-4)
    export_policy(model, policy.tokenizer, tmp_path / "out", merge=True, dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    torch.testing.assert_close((merged[name] - base[name].bfloat16().float()).double(), delta, atol=1e-7, rtol=0)


def test_the_probe_is_without_dropout_and_restores_every_training_mode(model_dir: Path) -> None:
    model = policy_of(model_dir, lora=False).load()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    model.model.layers[1].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert torch.equal(saving.probe_logits(model), saving.probe_logits(model))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}


def test_a_policy_beside_a_reference_adapter_exports_the_one_it_trains(model_dir: Path, tmp_path: Path) -> None:
    policy = policy_of(model_dir, lora=True)
    model = trained(policy)
    first = export_policy(model, policy.tokenizer, tmp_path / "first")
    expected = logits(model)
    model.load_adapter(str(tmp_path / "first"), adapter_name="reference", is_trainable=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reference." in name:
                parameter.zero_()
    for merge in (False, True):
        out = tmp_path / f"second-{merge}"
        second = export_policy(model, policy.tokenizer, out, merge=merge)
        assert merge or second.parameters == first.parameters
        assert not (out / "reference").exists()
        torch.testing.assert_close(logits(reload(out, adapter=not merge)), expected, atol=1e-5, rtol=1e-5)


def test_the_chat_template_and_padding_of_the_policy_are_kept(model_dir: Path, tmp_path: Path) -> None:
    policy = Policy(str(model_dir), chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    export_policy(policy.load(), policy.tokenizer, tmp_path / "out")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.chat_template, again.padding_side) == (policy.chat_template, "left")
    assert (again.pad_token, again.eos_token) == ("<pad>", "<eos>")


def test_a_tokenizer_is_saved_as_it_behaves_now(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["padding_side"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = "left"
    saving.save_tokenizer(tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": "{{ messages }}"}, "another chat template: got '{{ messages }}', expected \"{% for"),
        ({"eos_token": "<unk>"}, "another end-of-sequence token: got '<unk>', expected '<eos>'"),
        ({"pad_token": "<eos>"}, "another padding token: got '<eos>', expected '<pad>'"),
    ],
)
def test_a_tokenizer_that_reads_back_different_is_refused(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    from transformers import AutoTokenizer

    policy = policy_of(model_dir, lora=False)
    other = AutoTokenizer.from_pretrained(model_dir, **change)
    monkeypatch.setattr(policy.tokenizer, "save_pretrained", other.save_pretrained)
    with pytest.raises(ValueError, match=re.escape(message)):
        export_policy(policy.load(), policy.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_tied_weight_is_not_merged(model_dir: Path, tmp_path: Path) -> None:
    policy = Policy(str(model_dir), adapter=LoRA(r=4, alpha=8, target_modules=["lm_head"]))
    model = trained(policy)
    with pytest.raises(ValueError, match=r"merging changed the logits by .* export it without --merge"):
        export_policy(model, policy.tokenizer, tmp_path / "out", merge=True)
    assert list(tmp_path.iterdir()) == []
    report = export_policy(model, policy.tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(reload(report.directory, adapter=True)), logits(model), atol=1e-5, rtol=1e-5)


def test_a_directory_that_reads_back_different_is_not_kept(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(model_dir, lora=False)
    model = trained(policy)
    write = export._write_model

    def damaged(model: nn.Module, folder: Path, dtype: torch.dtype | None):
        result = write(model, folder, dtype)
        other = policy.load()
        other.save_pretrained(folder)
        return result

    monkeypatch.setattr(export, "_write_model", damaged)
    with pytest.raises(ValueError, match="reads back with logits that differ by"):
        export_policy(model, policy.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_base_has_changed_is_not_kept(model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    policy = policy_of(base, lora=True)
    model = trained(policy)
    trained(policy_of(model_dir, lora=False)).save_pretrained(base)
    with pytest.raises(ValueError, match="reads back with logits that differ"):
        export_policy(model, policy.tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(float("nan"), None, "not finite"), (1e6, "float16", "overflow in torch.float16; .* float32 or bfloat16")],
)
def test_weights_of_no_use_are_not_exported(
    model_dir: Path, tmp_path: Path, value: float, dtype: str | None, message: str
) -> None:
    policy = policy_of(model_dir, lora=False)
    model = policy.load()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(value)
    with pytest.raises(ValueError, match=message):
        export_policy(model, policy.tokenizer, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_merging_without_an_adapter_is_refused(model_dir: Path, tmp_path: Path) -> None:
    policy = policy_of(model_dir, lora=False)
    with pytest.raises(ValueError, match="no adapter to merge"):
        export_policy(policy.load(), policy.tokenizer, tmp_path / "out", merge=True)


def test_an_unknown_type_is_refused(model_dir: Path, tmp_path: Path) -> None:
    policy = policy_of(model_dir, lora=False)
    with pytest.raises(ValueError, match="got 'int8', expected one of float32, bfloat16, float16"):
        export_policy(policy.load(), policy.tokenizer, tmp_path / "out", dtype="int8")


def test_a_directory_in_use_is_left_alone(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ckpt = write_run(tmp_path / "run", model_dir, False, policy_of(model_dir, False).load())
    out = tmp_path / "out"
    out.mkdir()
    assert main(["--ckpt_path", str(ckpt), "--out", str(out)]) == 0  # an empty directory may be filled
    files = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(["--ckpt_path", str(ckpt), "--out", str(out)]) == 2
    assert "already a non-empty directory" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == files
    assert main(["--ckpt_path", str(ckpt), "--out", str(ckpt)]) == 2
    assert "already a file" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_writing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    for lora in (False, True):
        policy = policy_of(model_dir, lora)
        with pytest.raises(OSError, match=r"not enough space: about .* needed and 1,000 are free"):
            export_policy(policy.load(), policy.tokenizer, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(model_dir, lora=False)
    model = policy.load()

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left on device"):
        export_policy(model, policy.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ckpt = write_run(tmp_path / "run", model_dir, False, policy_of(model_dir, False).load())
    content = torch.load(ckpt, weights_only=True)
    torch.save(content | {"callbacks": Malicious(tmp_path / "pwned")}, ckpt)
    assert main(["--ckpt_path", str(ckpt), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "last.ckpt holds the Python object posix.mkdir" in message
    assert "weights_only" not in message
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 10, 2000, -100])
def test_a_truncated_checkpoint_is_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, size: int
) -> None:
    ckpt = write_run(tmp_path / "run", model_dir, False, policy_of(model_dir, False).load())
    ckpt.write_bytes(ckpt.read_bytes()[:size])
    assert main(["--ckpt_path", str(ckpt), "--out", str(tmp_path / "out")]) == 2
    assert "last.ckpt is damaged" in capsys.readouterr().err


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.ckpt").write_text("hello, this is not a checkpoint")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"state_dict": {"policy_model.a": "b"}}, tmp_path / "strings.ckpt")
    expected = {
        "text.ckpt": "damaged",
        "list.ckpt": "no state_dict of tensors",
        "strings.ckpt": "no state_dict of tensors",
        "absent.ckpt": "no checkpoint at",
        ".": "is a directory, expected one file",
    }
    for name, message in expected.items():
        assert main(["--ckpt_path", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_of_policy_is_named_as_such(model_dir: Path, tmp_path: Path) -> None:
    full, lora = (policy_of(model_dir, flag).load() for flag in (False, True))
    state = {flag: write_run(tmp_path / str(flag), model_dir, flag, m) for flag, m in ((False, full), (True, lora))}
    with pytest.raises(ValueError, match=r"20 missing .*28 unexpected .*trained an adapter, and this .* has none"):
        load_trained(full, read_checkpoint(state[True])["state_dict"], "last.ckpt")
    with pytest.raises(ValueError, match=r"trained all weights, and this configuration has an adapter"):
        load_trained(lora, read_checkpoint(state[False])["state_dict"], "last.ckpt")


def test_weights_of_another_shape_are_named(model_dir: Path, wide_dir: Path, tmp_path: Path) -> None:
    ckpt = write_run(tmp_path / "run", model_dir, False, policy_of(wide_dir, False).load())
    with pytest.raises(ValueError, match=r"4 of another shape .*k_proj.weight: got \(32, 32\), expected \(16, 32\)"):
        load_policy(ckpt)


def test_a_missing_an_unexpected_and_a_foreign_weight_are_named(model_dir: Path) -> None:
    model = policy_of(model_dir, False).load()
    state = {f"policy_model.{name}": p.detach().clone() + 1 for name, p in model.named_parameters()}
    before = model.model.norm.weight.detach().clone()
    gone = {name: p for name, p in state.items() if not name.endswith("model.norm.weight")}
    with pytest.raises(ValueError, match=r"1 missing \(model\.norm\.weight\)\. The configuration names another base"):
        load_trained(model, gone, "x.ckpt")
    with pytest.raises(ValueError, match=r"2 unexpected \(extra; value_head\.weight\)"):
        load_trained(model, state | {"value_head.weight": before, "policy_model.extra": before}, "x.ckpt")
    assert torch.equal(model.model.norm.weight, before)  # nothing is loaded where something does not fit


def test_a_tied_weight_may_come_under_either_name(model_dir: Path) -> None:
    model = policy_of(model_dir, False).load()
    expected = model.model.embed_tokens.weight.detach() + 1
    state = {f"policy_model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    del state["policy_model.model.embed_tokens.weight"]
    load_trained(model, state | {"policy_model.lm_head.weight": expected}, "x.ckpt")
    assert torch.equal(model.model.embed_tokens.weight, expected)


def test_a_given_configuration_outranks_the_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    model = policy_of(model_dir, True).load()
    ckpt = write_run(tmp_path / "run", tmp_path / "moved-away", True, model)
    init_args = {"path": str(model_dir), "adapter": {"r": 4, "alpha": 8}}
    config = tmp_path / "mine.yaml"
    description = {"class_path": "frpo.models.policy.Policy", "init_args": init_args}
    config.write_text(yaml.safe_dump({"model": {"policy": description}}))
    with pytest.raises(ValueError, match=r"no model\.init_args\.policy; expected the config.yaml that the run wrote"):
        load_policy(ckpt, config)
    config.write_text(yaml.safe_dump({"model": {"init_args": {"policy": description}}}))
    assert load_policy(ckpt, config).step == 7
    with pytest.raises(ValueError, match="moved-away"):
        load_policy(ckpt)


def test_a_configuration_that_cannot_serve_is_refused(model_dir: Path, tmp_path: Path) -> None:
    ckpt = write_run(tmp_path / "run", model_dir, False, policy_of(model_dir, False).load(), where="nowhere")
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*config\.yaml, .* with --config FILE"):
        load_policy(ckpt)
    config = tmp_path / "run" / "config.yaml"
    config.write_text("model: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_policy(ckpt)
    for wrong in ({"class_path": "os.system", "init_args": {}}, {"class_path": "frpo.models.policy.Policy"}, "text"):
        config.write_text(yaml.safe_dump({"model": {"init_args": {"policy": wrong}}}))
        with pytest.raises(ValueError, match="policy of the run cannot be rebuilt"):
            load_policy(ckpt)


def test_remote_code_asked_for_by_a_checkpoint_needs_the_users_word(model_dir: Path, tmp_path: Path) -> None:
    ckpt = write_run(tmp_path / "run", model_dir, False, policy_of(model_dir, False).load())
    content = torch.load(ckpt, weights_only=True)
    content["frpo"]["policy"]["init_args"]["trust_remote_code"] = True
    torch.save(content, ckpt)
    with pytest.raises(ValueError, match="pass --trust_remote_code if you trust its author"):
        load_policy(ckpt)
    assert load_policy(ckpt, trust_remote_code=True).policy.trust_remote_code
