"""Whatever a data file holds, its rows are read or refused by file and place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import VALUES, damaged, fuzzed, mutated, outcome, randoms
from hypothesis import given
from hypothesis import strategies as st

from frpo.data.demonstrations import layouts
from frpo.data.demonstrations.sources import FileDemonstrations
from frpo.data.preferences.sources import Labels, Preferences
from frpo.data.prompts.sources import FileSource

REFUSALS = (ValueError, FileNotFoundError)
ROW = {
    "prompt": "Name a colour.", "task": "normal", "completion": "Red.", "answer": "Red.", "chosen": "Red.",
    "rejected": "Nine.", "response": "Red.", "label": 1, "margin": 0.5, "instruction": "Name a colour.", "input": "",
    "output": "Red.", "instances": [{"input": "", "output": "Red."}], "question": "1+1?", "average_test_score": "1.0",
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}],
}  # fmt: skip
LAYOUTS = [
    layouts.PromptCompletion(), layouts.Alpaca(), layouts.SelfInstruct(), layouts.GSM8K(), layouts.Code(),
    layouts.Chat(), layouts.GSM8K(cut_answer=True),
]  # fmt: skip


def prompts(path: Path) -> object:
    return FileSource(path, default_task="normal").prompts()


READERS: list[Callable[[Path], object]] = [
    prompts,
    lambda path: FileSource(path, task=None, default_task="normal", id="label").prompts(),
    lambda path: Preferences(FileSource(path), margin="margin").examples(),
    lambda path: Labels(FileSource(path)).examples(),
    *(lambda path, layout=layout: FileDemonstrations(path, layout).demonstrations() for layout in LAYOUTS),
]


def written(rows: list[object], suffix: str, folder: Path) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".csv":
        lines = [",".join(ROW), *(",".join(f'"{row[name]}"' for name in ROW) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def refused_or_read(read: Callable[[Path], object], path: Path) -> None:
    # A reader of pairs knows a row by its id, which starts with the file's name without its suffix.
    outcome(lambda: read(path), REFUSALS, "rows" if path.is_file() else path.name)


@fuzzed(500)
@given(draw=randoms, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), read=st.sampled_from(READERS))
def test_a_damaged_file_is_read_or_refused(tmp_path, draw, suffix, read):
    path = written([ROW, {**ROW, "label": 0}], suffix, tmp_path)
    path.write_bytes(damaged(path.read_bytes(), draw))
    refused_or_read(read, path)


@fuzzed(500)
@given(draw=randoms, suffix=st.sampled_from([".jsonl", ".json"]), read=st.sampled_from(READERS))
def test_rows_of_any_shape_are_read_or_refused(tmp_path, draw, suffix, read):
    rows = mutated([ROW, {**ROW, "label": 0}], draw)
    path = written(rows if isinstance(rows, list) else [rows], suffix, tmp_path)
    refused_or_read(read, path)


@fuzzed(200)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes_are_rows_or_refused(tmp_path, data, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    refused_or_read(prompts, path)


@fuzzed(150)
@given(draw=randoms, read=st.sampled_from(READERS))
def test_a_parquet_file_of_any_columns_is_read_or_refused(tmp_path, draw, read):
    values = [v for v in VALUES if v is None or (isinstance(v, str) and v != "\ud800")] + [b"\xff", 1.5, float("inf")]
    row = {name: draw.choice([value, draw.choice(values), [draw.choice(values)]]) for name, value in ROW.items()}
    try:
        path = written([row], ".parquet", tmp_path)
    except (pa.ArrowException, TypeError):  # what parquet cannot hold
        return
    refused_or_read(read, path)


def folder_of_itself(path: Path) -> None:
    path.mkdir()
    (path / "rows.jsonl").symlink_to(path, target_is_directory=True)


PLACES: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path),
    "folder": lambda path: path.mkdir(),
    "folder of itself": folder_of_itself,
    "hidden in a folder": lambda path: (path.mkdir(), (path / ".rows.jsonl").write_text("{}")),
    "empty": lambda path: path.touch(),
    "dangling link": lambda path: path.symlink_to(path.with_name("gone")),
}


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_of_rows_is_refused(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    PLACES[kind](path)
    assert isinstance(outcome(lambda: prompts(path), REFUSALS, "rows"), str)
