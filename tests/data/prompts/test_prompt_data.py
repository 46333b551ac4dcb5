import json
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_models import build_tokenizer

from frpo.data.prompts.module import PromptDataModule
from frpo.data.prompts.sources import FileSource, PromptSource
from frpo.types import DataFacts, Prompt

CONF = Path(__file__).resolve().parents[3] / "conf" / "data"


class Listed(PromptSource):
    def __init__(self, count: int, tasks: Sequence[str] = ("normal",), words: int = 1) -> None:
        self.count, self.tasks, self.words, self.prepared = count, tasks, words, 0

    def prepare(self) -> None:
        self.prepared += 1

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(
                id=str(i),
                messages=(
                    {"role": "user", "content": " ".join(f"w{(i + k) % 40}" for k in range(self.words + i % 3))},
                ),
                task=self.tasks[i % len(self.tasks)],
            )
            for i in range(self.count)
        ]


class Reader(pl.LightningModule):
    """Trains nothing much; keeps the prompts it was given."""

    def __init__(self, tokenizer=None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._tokenizer = build_tokenizer() if tokenizer is None else tokenizer
        self.seen: list[tuple[list[str], list[int]]] = []
        self.evaluated: list[str] = []

    @property
    def tokenizer(self):
        return self._tokenizer

    def on_data_read(self, facts: DataFacts) -> None:
        self.facts = facts

    def training_step(self, batch, batch_idx):
        self.seen.append(([prompt.id for prompt in batch.prompts], batch.position.tolist()))
        self.manual_backward((self.weight - 1.0).square().sum())
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.evaluated += [prompt.id for prompt in batch.prompts]

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(tmp_path: Path, **options) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )


def fit(tmp_path: Path, data: PromptDataModule, ckpt_path: Path | None = None, **options) -> Reader:
    module = Reader()
    trainer_of(tmp_path, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


# Resume --------------------------------------------------------------------------------------------------------------


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


SETTINGS = [
    pytest.param({"max_epochs": 3}, id="epochs"),
    pytest.param({"max_steps": 9, "max_epochs": -1}, id="steps"),
    pytest.param({"max_epochs": 4, "limit_train_batches": 3}, id="epochs-cut-short"),
    pytest.param({"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, id="reloaded-every-epoch"),
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("val", [None, Listed(3)], ids=["", "val"])
def test_a_run_resumed_at_any_step_reads_what_the_whole_run_read(tmp_path: Path, options: dict, val) -> None:
    def data() -> PromptDataModule:
        return PromptDataModule(train=Listed(9), val=val, batch_size=2, seed=3)  # 4 steps an epoch, 1 prompt left over

    options = {"num_sanity_val_steps": 0, **options}
    saver = every_step(tmp_path)
    whole = fit(tmp_path, data(), callbacks=[saver], enable_checkpointing=True, **options).seen
    steps = len(whole)
    assert steps >= 9
    assert whole[0][0] != whole[4][0]
    assert len({position for _, positions in whole for position in positions}) == 2 * steps
    for step in range(1, steps):
        resumed = fit(tmp_path, data(), ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert resumed.seen == whole[step:], f"resumed after step {step}"


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_a_run_resumed_from_an_epochs_checkpoint(tmp_path: Path, on_train_epoch_end: bool) -> None:
    def data() -> PromptDataModule:
        return PromptDataModule(train=Listed(9), val=Listed(3), batch_size=2)

    saver = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{epoch}",
        every_n_epochs=1,
        save_top_k=-1,
        save_on_train_epoch_end=on_train_epoch_end,
    )
    whole = fit(tmp_path, data(), callbacks=[saver], enable_checkpointing=True, max_epochs=3).seen
    assert len(whole) == 12
    for epoch in range(2):
        resumed = fit(tmp_path, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=3)
        assert resumed.seen == whole[4 * (epoch + 1) :]


def test_the_checkpoint_holds_plain_integers(tmp_path: Path) -> None:
    fit(
        tmp_path,
        PromptDataModule(train=Listed(9), batch_size=2, seed=2**63 - 1),
        callbacks=[every_step(tmp_path)],
        enable_checkpointing=True,
        max_steps=5,
    )
    checkpoint = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [
        {"epoch": 1, "consumed": 2, "rows": 9, "shuffle": 1, "seed": 2**63 - 1}
    ]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_goes_on_with_another_batch_size(tmp_path: Path, before: int, after: int, step: int) -> None:
    def read(batch_size: int, **options) -> list[int]:
        data = PromptDataModule(train=Listed(12), batch_size=batch_size)
        return [p for _, positions in fit(tmp_path, data, **options).seen for p in positions]

    first = read(before, callbacks=[every_step(tmp_path)], enable_checkpointing=True, max_steps=step)
    then = read(after, ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=step + 5)
    assert first == list(range(step * before))
    expected, place = [], step * before
    for _ in range(5):
        if 12 - place % 12 < after:  # the epoch has no whole batch left
            place += 12 - place % 12
        expected += range(place, place + after)
        place += after
    assert then == expected


@pytest.mark.parametrize(("rows", "seed"), [(10, 0), (9, 1)])
def test_a_run_does_not_go_on_in_another_order(tmp_path: Path, rows: int, seed: int) -> None:
    fit(
        tmp_path,
        PromptDataModule(train=Listed(9), batch_size=2),
        callbacks=[every_step(tmp_path)],
        enable_checkpointing=True,
        max_steps=1,
    )
    with pytest.raises(ValueError, match="cannot go on in the training prompts"):
        fit(
            tmp_path,
            PromptDataModule(train=Listed(rows), batch_size=2, seed=seed),
            ckpt_path=tmp_path / "step=1.ckpt",
            max_steps=2,
        )


# Ranks ---------------------------------------------------------------------------------------------------------------


class Recorder(Reader):
    """Writes what each rank read, for the parent process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch, batch_idx):
        self.trainer.strategy.barrier()
        super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        record = {"seen": self.seen, "evaluated": self.evaluated}
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(record))


@pytest.mark.timeout(120)
def test_two_processes_read_together_what_one_reads(tmp_path: Path) -> None:
    options = {"max_epochs": 2, "num_sanity_val_steps": 0}
    alone = fit(tmp_path, PromptDataModule(train=Listed(11), val=Listed(5), batch_size=4, val_batch_size=8), **options)
    trainer_of(tmp_path, strategy="ddp_fork", **(options | {"devices": 2})).fit(
        Recorder(tmp_path), datamodule=PromptDataModule(train=Listed(11), val=Listed(5), batch_size=2, val_batch_size=2)
    )
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    together = [
        (a_ids + b_ids, a_places + b_places)
        for (a_ids, a_places), (b_ids, b_places) in zip(first["seen"], second["seen"], strict=True)
    ]
    assert together == alone.seen
    assert sorted(first["evaluated"] + second["evaluated"]) == sorted(alone.evaluated)
    assert not set(first["evaluated"]) & set(second["evaluated"])


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_validation_and_test_read_every_row_in_order(tmp_path: Path) -> None:
    data = PromptDataModule(val=Listed(7), test=Listed(5), batch_size=2, val_batch_size=3)
    for loop, count in (("validate", 7), ("test", 5)):
        module = Reader()
        getattr(trainer_of(tmp_path), loop)(module, datamodule=data, verbose=False)
        assert module.evaluated == [str(i) for i in range(count)]


def test_validation_does_not_move_the_training_stream(tmp_path: Path) -> None:
    plain = fit(tmp_path, PromptDataModule(train=Listed(9), batch_size=2), max_epochs=2)
    often = fit(
        tmp_path, PromptDataModule(train=Listed(9), val=Listed(3), batch_size=2), max_epochs=2, val_check_interval=1
    )
    assert often.seen == plain.seen
    assert len(often.evaluated) == 3 * 8 + 3


def test_a_run_without_validation_prompts_says_nothing_of_them(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    module = fit(tmp_path, PromptDataModule(train=Listed(4), batch_size=2), max_epochs=1)
    assert len(module.seen) == 2
    assert module.evaluated == []
    assert not [str(warning.message) for warning in recwarn if "length" in str(warning.message)]


@pytest.mark.parametrize(("loop", "name"), [("fit", "train"), ("validate", "val"), ("test", "test")])
def test_a_missing_source_is_named(tmp_path: Path, loop: str, name: str) -> None:
    sources = {other: Listed(4) for other in ("train", "val", "test") if other != name}
    with pytest.raises(ValueError, match=rf"no `{name}` source; set `data\.init_args\.{name}`"):
        getattr(trainer_of(tmp_path), loop)(Reader(), datamodule=PromptDataModule(**sources, batch_size=2))


# Long prompts --------------------------------------------------------------------------------------------------------
# Listed(9, words=1): three prompts each of 3, 4 and 5 tokens with the template.


def test_long_prompts_are_dropped_counted_and_logged_without_their_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = PromptDataModule(train=Listed(9), val=Listed(2), batch_size=2, max_prompt_length=4)
    with caplog.at_level(logging.DEBUG, logger="frpo"):
        module = fit(tmp_path, data, max_epochs=1)
    assert data.dropped == {"train": 3, "val": 0}
    assert {int(name) % 3 for names, _ in module.seen for name in names} == {0, 1}
    (record,) = [record for record in caplog.records if record.name.startswith("frpo")]
    assert record.levelname == "WARNING"
    assert "train: 3 of 9 prompts (33.3%) are longer than max_prompt_length=4 tokens" in record.getMessage()
    assert "w1" not in record.getMessage()


def test_nothing_is_logged_where_nothing_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = PromptDataModule(train=Listed(9), batch_size=2, max_prompt_length=5)
    with caplog.at_level(logging.WARNING, logger="frpo"):
        fit(tmp_path, data, max_epochs=1)
    assert data.dropped == {"train": 0}
    assert not [record for record in caplog.records if record.name.startswith("frpo")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_prompt_length": 4, "on_long_prompt": "error"}, r"3 of 9 prompts .*longest has 5, .*; raise `max_prompt"),
        ({"max_prompt_length": 2}, r"9 of 9 prompts .*longest has 5, the shortest 3: none is left"),
        ({"max_prompt_length": 3, "batch_size": 4}, r"3 training prompts do not fill one step"),
    ],
)
def test_long_prompts_stop_the_run(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, PromptDataModule(**{"train": Listed(9), "batch_size": 2, **options}), max_epochs=1)


# What is refused, and what is asked of others ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"val_batch_size": -1}, "val_batch_size: got -1"),
        ({"max_prompt_length": 0}, "max_prompt_length: got 0"),
        ({"on_long_prompt": "cut"}, "on_long_prompt: got 'cut', expected one of drop, error"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**63}, "seed: got 9223372036854775808"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PromptDataModule(train=Listed(4), **options)


def test_constructing_reads_nothing() -> None:
    PromptDataModule(train=FileSource("/nowhere.jsonl"))


def test_setup_without_a_trainer() -> None:
    with pytest.raises(ValueError, match="without a Trainer"):
        PromptDataModule(train=Listed(4)).setup("fit")


def test_a_module_without_a_tokenizer(tmp_path: Path) -> None:
    class Bare(pl.LightningModule):
        training_step = Reader.training_step
        configure_optimizers = Reader.configure_optimizers

    with pytest.raises(ValueError, match="Bare has no `tokenizer` and `on_data_read`"):
        trainer_of(tmp_path, max_epochs=1).fit(Bare(), datamodule=PromptDataModule(train=Listed(4), batch_size=2))


def test_a_tokenizer_without_a_pad_token(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        trainer_of(tmp_path, max_epochs=1).fit(
            Reader(tokenizer), datamodule=PromptDataModule(train=Listed(4), batch_size=2)
        )


def test_overfit_batches_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"overfit_batches.*`data\.init_args\.train\.init_args\.limit`"):
        fit(tmp_path, PromptDataModule(train=Listed(4), batch_size=2), max_epochs=1, overfit_batches=1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_no_precision_touches_a_batch(tmp_path: Path, precision: str) -> None:
    seen = fit(tmp_path, PromptDataModule(train=Listed(4), batch_size=2), max_epochs=1, precision=precision).seen
    assert seen == fit(tmp_path, PromptDataModule(train=Listed(4), batch_size=2), max_epochs=1).seen


@pytest.mark.parametrize("name", ["frpo_parquet"])
def test_the_shipped_fragments_read_the_published_layout(tmp_path: Path, shared_data: Path, name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptDataModule, "data")
    folder, published = tmp_path / "data" / "frpo", shared_data / "frpo"
    folder.mkdir(parents=True)
    for file in ("safety.jsonl", "normal.jsonl", "train_lambda_0.5.parquet"):
        (folder / file).symlink_to(published / file)
    rows = pq.read_table(folder / "train_lambda_0.5.parquet").slice(900, 200).to_pylist()  # the table is sorted by task
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (CONF / f"{name}.yaml").read_text().replace("${seed_everything}", "7")
    text = text.replace("${data_dir}", str(folder.parent))
    config = parser.parse_object(yaml.safe_load(text))
    data = parser.instantiate(config).data
    train, val = data.sources["train"].prompts(), data.sources["val"].prompts()
    assert {prompt.task for prompt in train} == {prompt.task for prompt in val} == {"safety", "normal"}
    assert [prompt.task for prompt in val] == ["safety"] * 128 + ["normal"] * 128


def test_the_module_hears_of_the_data_before_the_first_step(tmp_path: Path) -> None:
    class Picky(Reader):
        def on_data_read(self, facts: DataFacts) -> None:
            super().on_data_read(facts)
            raise ValueError(f"no reward for {sorted(facts.tasks)}")

    module = Picky()
    data = PromptDataModule(train=Listed(4, tasks=("a", "b")), val=Listed(2, tasks=("c",)), batch_size=2)
    with pytest.raises(ValueError, match=r"no reward for \['a', 'b', 'c'\]"):
        trainer_of(tmp_path, max_epochs=1).fit(module, datamodule=data)
    assert module.seen == []
    assert module.facts == DataFacts(frozenset("abc"), max_tokens=1024)


def test_sources_are_prepared_once_before_they_are_read(tmp_path: Path) -> None:
    source = Listed(4)
    fit(tmp_path, PromptDataModule(train=source, batch_size=2), max_epochs=1)
    assert source.prepared == 1


def test_published_training_set_through_the_chat_template(tmp_path: Path, shared_data: Path) -> None:
    tasks = {"wildjailbreak": "safety", "rainbow": "safety", "aegis": "safety", "refusal": "normal"}
    source = FileSource(shared_data / "frpo" / "train_lambda_0.5.parquet", task="ability", task_map=tasks)
    data = PromptDataModule(train=source, batch_size=16, max_prompt_length=200)
    module = fit(tmp_path, data, max_epochs=1)
    kept = 2000 - data.dropped["train"]
    assert 0 < data.dropped["train"] < 1000
    assert len(module.seen) == kept // 16
    assert len({name for names, _ in module.seen for name in names}) == kept // 16 * 16
