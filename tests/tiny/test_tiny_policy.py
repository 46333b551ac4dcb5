import filecmp
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from frpo.models.policy import LoRA
from frpo.tiny import TinyDemonstrations, TinySource
from frpo.tiny import policy as tiny
from frpo.tiny.corpus import pretraining_rows
from frpo.tiny.policy import TinyPolicy, build_tokenizer, encode_corpus, pretrain


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> TinyPolicy:
    """Twenty steps: loads and samples, knows nothing."""
    policy = TinyPolicy(steps=20, cache_dir=str(tmp_path_factory.mktemp("cache")))
    policy.prepare()
    return policy


def test_tokens_are_words_and_come_back(policy):
    tokenizer = policy.tokenizer
    (row,) = TinyDemonstrations("comply", limit=1).demonstrations()
    prompt, answer = row.prompt, row.answer
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(answer.split())
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == answer
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert "<unk>" not in tokenizer.tokenize(prompt.messages[0]["content"])


def test_saved_tokenizer_is_the_one_in_memory(policy):
    saved, built = AutoTokenizer.from_pretrained(policy.path), policy.tokenizer
    messages = [dict(TinySource().prompts()[0].messages[0]), {"role": "assistant", "content": "sure use the lamp"}]
    assert saved.get_vocab() == built.get_vocab()
    assert saved.apply_chat_template(messages) == built.apply_chat_template(messages)
    for name in ("pad_token_id", "eos_token_id", "padding_side", "all_special_ids"):
        assert getattr(saved, name) == getattr(built, name)


def test_corpus_is_encoded_as_the_chat_template_writes_it():
    tokenizer = build_tokenizer()
    encoded = encode_corpus(tokenizer, seed=4, rows=50)
    for row, (asked, said) in zip(encoded.tolist(), pretraining_rows(4, 50), strict=True):
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        whole = tokenizer.apply_chat_template(chat, return_dict=False)
        opening = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        assert row == whole + [tokenizer.pad_token_id] * (len(row) - len(whole))
        assert whole[: len(opening)] == opening
        assert whole[-1] == tokenizer.eos_token_id


def test_policy_loads_and_writes(policy):
    model = policy.load()
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 140_000
    assert all(p.requires_grad for p in model.parameters())
    assert policy.load_base().config.eos_token_id == policy.tokenizer.eos_token_id
    prompt = policy.tokenizer.apply_chat_template(
        [dict(m) for m in TinySource().prompts()[0].messages], add_generation_prompt=True, return_tensors="pt"
    )
    written = model.eval().generate(**prompt, do_sample=False, max_new_tokens=5)
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_an_adapter_leaves_the_rest_frozen(policy):
    adapted = TinyPolicy(steps=20, cache_dir=str(Path(policy.path).parent), adapter=LoRA(r=2, alpha=4)).load()
    assert all("lora" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_same_seed_same_bytes(policy, tmp_path):
    torch.set_num_threads(2)
    assert pretrain(tmp_path / "again", seed=0, steps=20) < 4.0  # uniform over the vocabulary: 5.3
    files = sorted(file.name for file in Path(policy.path).iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)
    same, different, missing = filecmp.cmpfiles(policy.path, tmp_path / "again", files, shallow=False)
    assert (different, missing) == ([], [])
    assert same == files


def test_other_seed_other_weights(tmp_path):
    losses = [pretrain(tmp_path / str(seed), seed=seed, steps=2) for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_pretraining_leaves_random_state_threads_and_gradient_mode_alone(tmp_path, monkeypatch):
    inside, train = [], tiny._train
    monkeypatch.setattr(tiny, "_train", lambda *a, **k: (inside.append(torch.get_num_threads()), train(*a, **k))[1])
    torch.manual_seed(11)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    with torch.no_grad():
        pretrain(tmp_path, seed=0, steps=2)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert (inside, torch.get_num_threads()) == ([1], 2)


def test_cache_is_used_and_left_clean(policy, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "pretrain", lambda *_, **__: pytest.fail("the cache has it"))
    same = TinyPolicy(steps=20, cache_dir=str(Path(policy.path).parent))
    same.prepare()
    assert same.path == policy.path
    assert [entry.name for entry in Path(policy.path).parent.iterdir()] == [Path(policy.path).name]


def test_cache_tells_settings_and_code_apart(policy, monkeypatch, tmp_path):
    folder = str(tmp_path)
    names = {
        TinyPolicy(seed=s, steps=n, cache_dir=folder).path
        for s, n in ((0, 1), (1, 1), (0, 2), (0, 11), (1, 11), (11, 1))
    }
    assert len(names) == 6
    before = TinyPolicy(cache_dir=folder).path
    (tmp_path / "world.py").write_text("CHANGED = 1")
    monkeypatch.setattr(tiny, "__file__", str(tmp_path / "policy.py"))
    assert TinyPolicy(cache_dir=folder).path != before


def test_constructor_and_tokenizer_make_nothing(tmp_path):
    assert TinyPolicy(cache_dir=str(tmp_path / "cache")).tokenizer.chat_template
    assert not (tmp_path / "cache").exists()


def test_loading_prepares(tmp_path, capsys):
    TinyPolicy(steps=1, cache_dir=str(tmp_path)).load()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("tiny policy")] == ["tiny policy"] * 2


def test_a_failed_pretraining_leaves_no_folder(tmp_path, monkeypatch):
    def fail(made, **_):
        Path(made).mkdir()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny, "pretrain", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        TinyPolicy(cache_dir=str(tmp_path)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_processes_stays(tmp_path, monkeypatch):
    policy = TinyPolicy(steps=1, cache_dir=str(tmp_path))

    def overtaken(made, **_):
        for folder, text in ((Path(made), "second"), (Path(policy.path), "first")):
            folder.mkdir()
            (folder / "config.json").write_text(text)

    monkeypatch.setattr(tiny, "pretrain", overtaken)
    policy.prepare()
    assert (Path(policy.path) / "config.json").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"TinyPolicy.steps: got 0, expected at least 1"),
        ({"seed": -1}, r"TinyPolicy.seed: got -1, expected 0"),
        ({"dtype": "int8"}, r"Policy.dtype: got 'int8'"),
    ],
)
def test_policy_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TinyPolicy(**arguments)
