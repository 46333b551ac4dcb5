"""Demonstrations are tokenized as they are sampled, and handed out to the ranks in a stream that resumes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import runs
import supervised_runs
import torch
from supervised_runs import Echo
from toy_models import CHAT_TEMPLATE, build_tokenizer

from frpo.data.demonstrations.batch import collate_demonstrations, encode_demonstrations, first_fit
from frpo.data.demonstrations.module import SupervisedDataModule
from frpo.data.prompts.batch import encode
from frpo.tiny import TinyDemonstrations
from frpo.tiny.policy import build_tokenizer as tiny_tokenizer
from frpo.types import DataFacts, Demonstration, Prompt

pytestmark = pytest.mark.filterwarnings("ignore")


def demonstration(answer: str, asked: str = "w1 w2") -> Demonstration:
    return Demonstration(Prompt("7", ({"role": "user", "content": asked},), "t"), answer)


def tokens(tokenizer, answer: str) -> tuple[list[str], list[str]]:
    """The tokens of the prompt, and those of the answer."""
    (row,) = encode_demonstrations([demonstration(answer)], tokenizer)
    words = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    return words[: row.answer_start], words[row.answer_start :]


@pytest.mark.parametrize("task", ["comply", "arithmetic"])
def test_the_tiny_worlds_prompts_are_those_sampled_from_and_answers_end(task) -> None:
    tokenizer = tiny_tokenizer()
    demonstrations = TinyDemonstrations(task, limit=50).demonstrations()
    prompts = encode([d.prompt for d in demonstrations], tokenizer)
    rows = encode_demonstrations(demonstrations, tokenizer)
    for row, prompt, shown in zip(rows, prompts, demonstrations, strict=True):
        assert torch.equal(row.ids[: row.answer_start], prompt.ids)
        answer = row.ids[row.answer_start :]
        assert tokenizer.decode(answer[:-1]) == shown.answer
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in row.ids


@pytest.mark.parametrize(
    "end", ["", "<eos>", "<eos> ", " <eos>\n"], ids=["added", "written", "space behind", "newline behind"]
)
def test_an_answer_ends_in_one_end_token(end: str) -> None:
    tokenizer = build_tokenizer()
    written = "{% if m['role'] == 'assistant' %}" + end + "{% endif %}{% endfor %}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% endfor %}", written)
    assert tokens(tokenizer, "w3 w4") == (["<user>", "w1", "w2", "<assistant>"], ["w3", "w4", "<eos>"])


def test_an_end_token_inside_an_answer_does_not_cut_it() -> None:
    assert tokens(build_tokenizer(), "w3 <eos> w4")[1] == ["w3", "<eos>", "w4", "<eos>"]


def test_a_template_that_writes_the_prompt_in_another_way_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>{%", "<assistant> <system>{%")
    with pytest.raises(ValueError, match="writes prompt '7' in one way before an answer.*chat_template"):
        tokens(tokenizer, "w3")


def test_tokens_that_would_join_prompt_and_answer_stay_apart() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "a", "b", "Ċ", "ĊĊ"])}
    raw = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'b\n' if m['role'] == 'assistant' else '' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'b\n' }}{% endif %}"
    )
    (row,) = encode_demonstrations([demonstration("\na", asked="a")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.ids.tolist()) == ["a", "b", "Ċ", "Ċ", "a", "<eos>"]
    assert row.answer_start == 3


def test_a_batch_masks_all_but_the_answers() -> None:
    tokenizer = build_tokenizer()
    rows = encode_demonstrations([demonstration("w3"), demonstration("w3 w4 w5", asked="w1")], tokenizer)
    batch = collate_demonstrations(rows, tokenizer.pad_token_id)
    assert batch.input_ids[0].tolist() == [*rows[0].ids.tolist(), tokenizer.pad_token_id]
    assert batch.answer_mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert (batch.tokens, len(batch)) == (6, 2)
    long, short = batch.split(1)
    assert (long.ids, long.input_ids.shape, short.input_ids.shape) == (("7",), (1, 7), (1, 6))
    assert torch.equal(short.answer_mask[0], batch.answer_mask[0, :6])


def test_packed_micro_batches_hold_the_same_demonstrations_in_fewer_rows() -> None:
    rows = encode_demonstrations(Echo(11).demonstrations(), build_tokenizer())
    plain = collate_demonstrations(rows, 0)
    packed = collate_demonstrations(rows, 0, row_tokens=16)
    parts = list(packed.split(2))
    assert [len(part.input_ids) for part in parts[:-1]] == [2] * (len(parts) - 1)
    assert sum(len(part.input_ids) for part in parts) < len(rows)
    assert {name for part in parts for name in part.ids} == set(plain.ids)
    assert sum(part.tokens for part in parts) == plain.tokens == packed.tokens
    for part in parts:
        names = iter(part.ids)
        for ids, positions, mask, answers in zip(
            part.input_ids, part.position_ids, part.mask, part.answer_mask, strict=True
        ):
            assert mask.sum() <= 16
            length = int(mask.sum())
            assert not answers[length:].any()
            assert not positions[length:].any()
            starts = [*(positions[:length] == 0).nonzero().flatten().tolist(), length]
            for start, end in itertools.pairwise(starts):
                row = rows[int(next(names))]
                assert torch.equal(ids[start:end], row.ids)
                assert positions[start:end].tolist() == list(range(end - start))
                assert answers[start:end].tolist() == [t >= row.answer_start for t in range(end - start)]
        assert next(names, None) is None


def test_rows_are_filled_first_fit_in_order() -> None:
    assert first_fit([5, 6, 3, 4, 2, 8], 8) == [[0, 2], [1, 4], [3], [5]]


def test_packing_does_not_change_the_stream() -> None:
    rows = encode_demonstrations(Echo(21).demonstrations(), build_tokenizer())

    def loader(packing: bool):
        data = supervised_runs.data(batch_size=4, packing=packing)
        return data.training_loader(rows, pad_token_id=0, world_size=1, rank=0)

    plain, packed, resumed = loader(False), loader(True), loader(True)
    assert [batch.ids for batch in plain] == [batch.ids for batch in packed]
    assert {batch.row_tokens for batch in packed} == {32}
    plain, other = loader(False), loader(True)
    next(iter(plain))
    resumed.load_state_dict(plain.state_dict())
    assert [batch.ids for batch in resumed][:4] == [batch.ids for batch in other][1:]


class Reader(runs.L.LightningModule):
    """Keeps the ids of its batches."""

    tokenizer = build_tokenizer()

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[list[str]] = []
        self.validated: list[str] = []

    def on_data_read(self, facts: DataFacts) -> None:
        self.facts = facts

    def training_step(self, batch, _) -> None:
        self.seen.append(list(batch.ids))

    def validation_step(self, batch, _) -> None:
        self.validated += batch.ids

    def configure_optimizers(self) -> None:
        return None


def read(root: Path, data: SupervisedDataModule, **options) -> Reader:
    reader = Reader()
    runs.trainer(root, **{"max_steps": -1, "max_epochs": 1, **options}).fit(reader, datamodule=data)
    return reader


def test_an_epoch_reads_every_row_once_but_for_what_fills_no_batch(tmp_path: Path) -> None:
    reader = read(tmp_path, supervised_runs.data(21, batch_size=4, val=5), max_epochs=2)
    assert [len(batch) for batch in reader.seen] == [4] * 10
    first, second = ([name for batch in reader.seen[i : i + 5] for name in batch] for i in (0, 5))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert reader.validated[:5] == ["0", "1", "2", "3", "4"]


def test_a_stream_goes_on_at_the_next_batch(tmp_path: Path) -> None:
    def loader(group: bool):
        data = supervised_runs.data(21, batch_size=4, group_by_length=group)
        rows = encode_demonstrations(Echo(21).demonstrations(), build_tokenizer())
        return data.training_loader(rows, pad_token_id=0, world_size=1, rank=0)

    for group in (False, True):
        whole, first, second = loader(group), loader(group), loader(group)
        expected = [batch.ids for _ in range(2) for batch in whole]
        stream = iter(first)
        seen = [next(stream).ids for _ in range(3)]
        second.load_state_dict(first.state_dict())
        seen += [batch.ids for _ in range(2) for batch in second]
        assert seen[:10] == expected
    with pytest.raises(ValueError, match="cannot go on in the training demonstrations.*group_by_length"):
        loader(False).load_state_dict(whole.state_dict())


def test_grouping_by_length_reads_the_same_rows_in_batches_of_like_lengths() -> None:
    rows = encode_demonstrations(Echo(103).demonstrations(), build_tokenizer())

    def batches(group: bool, world_size: int = 1, rank: int = 0, batch_size: int = 8):
        data = supervised_runs.data(batch_size=batch_size, group_by_length=group)
        return list(data.training_loader(rows, pad_token_id=0, world_size=world_size, rank=rank))

    plain, grouped = batches(False), batches(True)
    padding = [sum((~batch.mask).sum().item() for batch in found) for found in (plain, grouped)]
    assert padding[1] < padding[0] / 3
    names = [{name for batch in found for name in batch.ids} for found in (plain, grouped)]
    assert names[0] == names[1]
    lengths = [batch.mask.sum().item() for batch in grouped]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True)), "batches are in random order"
    halves = [batches(True, 2, rank, batch_size=4) for rank in (0, 1)]
    assert [a.ids + b.ids for a, b in zip(*halves, strict=True)] == [batch.ids for batch in grouped]


@pytest.mark.parametrize(
    ("on_long", "dropped", "cut", "said"),
    [
        ("drop", 10, 0, "train: 10 of 20 demonstrations (50.0%) are longer than max_length=8 tokens"),
        ("cut", 0, 10, "train: 10 of 20 answers are cut at max_length=8 tokens"),
    ],
)
def test_long_rows_are_dropped_or_cut_and_counted(
    tmp_path: Path, caplog, on_long, dropped: int, cut: int, said: str
) -> None:
    data = SupervisedDataModule(Echo(20), batch_size=2, max_length=8, on_long=on_long)
    reader = read(tmp_path, data)
    assert (data.dropped["train"], data.cut["train"]) == (dropped, cut)
    assert len({name for batch in reader.seen for name in batch}) == 20 - dropped
    assert said in caplog.text


def test_a_row_is_cut_at_the_limit_and_dropped_where_no_answer_is_left(tmp_path: Path) -> None:
    data = SupervisedDataModule(Echo(20), batch_size=2, max_length=6, on_long="cut")
    read(tmp_path, data)
    assert data.dropped["train"] == 5  # prompts of four words are six tokens
    assert all(row.answer_start < len(row.ids) <= 6 for row in data.train_dataloader().rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": None}, "no `train` source.*FileDemonstrations"),
        ({"max_length": 8, "on_long": "error"}, "10 of 20 demonstrations .*raise `max_length`"),
        ({"max_length": 3}, "20 of 20 .*none is left"),
        ({"batch_size": 21}, "20 training demonstrations do not fill one step"),
    ],
)
def test_refuses_before_the_first_step(tmp_path: Path, change, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read(tmp_path, SupervisedDataModule(**{"train": Echo(20), "batch_size": 2, **change}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"max_length": 0}, "max_length: got 0"),
        ({"on_long": "truncate"}, "on_long: got 'truncate'"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_refuses_bad_arguments(change, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SupervisedDataModule(Echo(), **change)


def test_it_has_no_rows_to_test_on(tmp_path: Path) -> None:
    class Tested(Reader):
        def test_step(self, batch, batch_idx) -> None:
            """Never reached."""

    with pytest.raises(ValueError, match="has rows for train and val, none for test"):
        runs.trainer(tmp_path).test(Tested(), datamodule=supervised_runs.data())


def test_the_tiny_demonstrations_are_the_same_in_every_run_and_shown_to_no_risky_prompt() -> None:
    for task in ("comply", "arithmetic"):
        rows = TinyDemonstrations(task).demonstrations()
        assert rows == TinyDemonstrations(task).demonstrations()
        assert len({row.prompt.id for row in rows}) == len(rows)
        assert {row.prompt.task for row in rows} == {"benign" if task == "comply" else "arithmetic"}
        held_out = TinyDemonstrations(task, split="held_out").demonstrations()
        assert not {row.prompt.id for row in rows} & {row.prompt.id for row in held_out}
    with pytest.raises(ValueError, match="TinyDemonstrations.task"):
        TinyDemonstrations("refuse")
