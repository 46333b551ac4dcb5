"""Model directories and checkpoints with a payload are refused, and the payload is not run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import damaged, fuzzed, outcome, randoms
from hypothesis import given
from hypothesis import strategies as st

from frpo.__main__ import main
from frpo.models.policy import LoRA, Policy
from frpo.rewards.judges.strongreject_model import StrongRejectModel
from frpo.rewards.model import RewardModel

LOADERS = {
    "policy": lambda path: Policy(path).load(),
    "tokenizer": lambda path: Policy(path).tokenizer,
    "reward model": lambda path: RewardModel(path).setup(torch.device("cpu")),
    "judge": lambda path: StrongRejectModel(path, max_length=64).setup(torch.device("cpu")),
}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def copy(tmp_path: Path, model_dir: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copied"))


@pytest.mark.parametrize("load", ["policy", "reward model", "judge"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused(copy, tmp_path, load, name):
    marker = tmp_path / "MARKER"
    (copy / "model.safetensors").unlink()
    torch.save(Payload(marker), copy / name)
    with pytest.raises((ValueError, OSError), match="copied"):
        LOADERS[load](str(copy))
    assert not marker.exists()


def test_a_pickled_adapter_is_refused(copy, tmp_path):
    marker = tmp_path / "MARKER"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Payload(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter"):
        Policy(str(copy), adapter=LoRA(path=str(adapter))).load()
    assert not marker.exists()


@pytest.mark.parametrize("load", LOADERS)
def test_code_that_comes_with_a_model_is_not_run(copy, tmp_path, load):
    marker = tmp_path / "MARKER"
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        tree = json.loads((copy / file).read_text())
        tree["auto_map"] = {name: [f"evil.{name}", None] if "Tok" in name else f"evil.{name}" for name in classes}
        tree |= {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
        (copy / file).write_text(json.dumps(tree))
    with pytest.raises((ValueError, OSError)):
        LOADERS[load](str(copy))
    assert not marker.exists()


@fuzzed(30)
@given(draw=randoms, load=st.sampled_from(["policy", "tokenizer"]))
def test_a_damaged_directory_is_loaded_or_refused(model_dir, tmp_path_factory, draw, load):
    path = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("damaged") / "copied"))
    file = draw.choice(sorted(path.iterdir()))
    data = file.read_bytes()
    head, rest = (data, b"") if file.suffix != ".safetensors" else (data[:2000], data[2000:])
    file.write_bytes(damaged(head, draw) + rest)
    outcome(lambda: [LOADERS[load](str(path))], (ValueError, OSError), "copied")


@pytest.mark.parametrize("kind", ["checkpoint", "bare pickle", "folder"])
def test_every_command_refuses_a_checkpoint_with_a_payload(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    marker, path = tmp_path / "MARKER", tmp_path / "last.ckpt"
    if kind == "checkpoint":
        torch.save({"state_dict": {}, "loops": {}, "optimizer_states": [Payload(marker)]}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        path.mkdir()
        torch.save({"loops": Payload(marker)}, path / "meta.pt")
        (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    run = ("--config", "recipes/tiny/grpo.yaml", "--trainer.logger", "false", "--ckpt_path", str(path))
    suites = ("--config", "conf/evaluation/tiny.yaml", "--ckpt_path", str(path))
    for words in (("fit", *run), ("validate", *run), ("evaluate", *suites), ("export", *suites[2:], "--out", "out")):
        monkeypatch.setattr("sys.argv", ["frpo", *words])
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr().err
        said = said[said.index(f"frpo {words[0]}: error:") :]
        assert status == 2, said
        assert "last.ckpt" in said
        assert "Traceback" not in said
    assert not marker.exists()
