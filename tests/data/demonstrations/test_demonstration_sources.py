"""Demonstrations are read out of files in the layouts that data sets are published in."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from frpo.data.demonstrations.layouts import GSM8K, Alpaca, Chat, Code, PromptCompletion, SelfInstruct
from frpo.data.demonstrations.sources import FileDemonstrations, HubDemonstrations, JoinedDemonstrations


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


TURNS = [*user("Hi"), {"role": "assistant", "content": "Hello"}, *user("Bye"), {"role": "assistant", "content": "So"}]


@pytest.mark.parametrize(
    ("layout", "row", "messages", "answer"),
    [
        (PromptCompletion(), {"prompt": "a", "completion": "b"}, user("a"), "b"),
        (PromptCompletion(), {"prompt": list(user("a")), "completion": "b"}, user("a"), "b"),
        (PromptCompletion("q", "r"), {"q": "a", "r": "b", "s": 1}, user("a"), "b"),
        (Alpaca(), {"instruction": "Add", "input": "1 2", "output": "3"}, user("Add\n\n1 2"), "3"),
        (Alpaca(), {"instruction": "Add", "input": "", "output": "3"}, user("Add"), "3"),
        (Alpaca(), {"instruction": "Add", "output": "3"}, user("Add"), "3"),
        (GSM8K(), {"question": "q", "answer": "1+1\n#### 2"}, user("q"), "1+1\n#### 2"),
        (GSM8K(cut_answer=True), {"question": "q", "answer": "1+1\n#### 2"}, user("q"), "1+1"),
        (Code(), {"input": "t", "output": "x", "average_test_score": "1.0"}, user("t"), "x"),
        (Code(min_test_score=None), {"input": "t", "output": "x"}, user("t"), "x"),
        (Chat(), {"messages": TURNS}, tuple(TURNS[:-1]), "So"),
    ],
)
def test_a_row_becomes_a_demonstration(tmp_path: Path, layout, row, messages, answer: str) -> None:
    source = FileDemonstrations(write(tmp_path / "rows.jsonl", row), layout, task="t")
    (found,) = source.demonstrations()
    assert (found.prompt.messages, found.answer) == (messages, answer)
    assert (found.prompt.id, found.prompt.task) == ("rows:0", "t")


def test_rows_of_several_instances_are_several_demonstrations(tmp_path: Path) -> None:
    row = {"id": "a", "instruction": "Add", "instances": [{"input": "1", "output": "2"}, {"input": "", "output": "3"}]}
    rows = FileDemonstrations(write(tmp_path / "rows.jsonl", row), SelfInstruct(), id="id").demonstrations()
    assert [(r.prompt.id, r.prompt.messages, r.answer) for r in rows] == [
        ("a.0", user("Add\n\n1"), "2"),
        ("a.1", user("Add"), "3"),
    ]


def test_failing_programs_and_empty_answers_are_left_out_and_counted(tmp_path: Path, caplog) -> None:
    scores = ["1.0", "0.9", 1, "1", 0.0, "1.0"]
    rows = [{"input": f"t{i}", "output": "x", "average_test_score": score} for i, score in enumerate(scores)]
    rows[3]["output"] = " \n"
    source = FileDemonstrations(write(tmp_path / "rows.jsonl", *rows), Code(), limit=3)
    assert [row.prompt.id for row in source.demonstrations()] == ["rows:0", "rows:2", "rows:5"]
    assert dict(source.left_out) == {"rows that Code filters": 2, "empty answers": 1}
    assert "kept 3 demonstrations, left out {'rows that Code filters': 2, 'empty answers': 1}" in caplog.text
    source.limit = 1
    assert len(source.demonstrations()) == 1
    assert not source.left_out, "rows behind the limit were read"


def test_a_system_message_stands_before_every_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    (row,) = FileDemonstrations(path, PromptCompletion(), system="Be brief.").demonstrations()
    assert row.prompt.messages == ({"role": "system", "content": "Be brief."}, *user("a"))


@pytest.mark.parametrize(
    ("layout", "row", "named"),
    [
        (
            Alpaca(),
            {"instructions": "a", "output": "b"},
            r"line 1: no column 'instruction'.*Did you mean 'instructions'",
        ),
        (Alpaca(), {"instruction": "a", "output": 3}, "the answer in column 'output' is an int, expected a string"),
        (Alpaca(), {"instruction": " ", "output": "b"}, "empty 'content'"),
        (GSM8K(cut_answer=True), {"question": "q", "answer": "2"}, "no '####' to be cut at.*cut_answer: false"),
        (Code(), {"input": "t", "output": "x", "average_test_score": "good"}, "is a str and no number"),
        (Code(), {"input": "t", "output": "x"}, "no column 'average_test_score'"),
        (Chat(), {"messages": TURNS[:1]}, "does not end with a message of role 'assistant'"),
        (Chat(), {"messages": TURNS[1:2]}, "expected a string or a non-empty list"),
        (Chat(), {"messages": "Hi"}, "is a str, expected a list"),
        (SelfInstruct(), {"instruction": "a", "instances": {}}, "expected a list of {input, output}"),
        (Alpaca(), {"instruction": "a", "output": "\ud83d"}, "half of a surrogate pair"),
        (Alpaca(), {"instruction": "a", "output": ""}, "holds no demonstrations.*'empty answers': 1"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, layout, row, named: str) -> None:
    with pytest.raises(ValueError, match=rf"rows.jsonl.*{named}"):
        FileDemonstrations(write(tmp_path / "rows.jsonl", row), layout).demonstrations()


def test_ids_are_unique(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "id": 1}
    path = write(tmp_path / "rows.jsonl", row, row)
    with pytest.raises(ValueError, match="1 ids stand for more than one prompt"):
        FileDemonstrations(path, PromptCompletion(), id="id").demonstrations()
    source = FileDemonstrations(path, PromptCompletion())
    with pytest.raises(ValueError, match="joined sources: 2 ids"):
        JoinedDemonstrations([source, source]).demonstrations()


def test_refuses_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit: got 0"):
        FileDemonstrations("x.jsonl", Alpaca(), limit=0)
    with pytest.raises(ValueError, match=r"JoinedDemonstrations.sources: got \[\]"):
        JoinedDemonstrations([])
    with pytest.raises(FileNotFoundError, match="no file at"):
        FileDemonstrations(tmp_path / "x.jsonl", Alpaca()).demonstrations()


def test_sources_are_joined_in_their_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": "b"}) for name in "ab"]
    joined = JoinedDemonstrations([FileDemonstrations(path, PromptCompletion()) for path in paths])
    joined.prepare()
    assert [row.prompt.id for row in joined.demonstrations()] == ["a:0", "b:0"]


def test_the_hub_is_asked_for_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return [{"instruction": "Add", "input": "", "output": "3"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = HubDemonstrations("tatsu-lab/alpaca", Alpaca(), split="train[:10]", revision="abc", task="alpaca")
    source.prepare()
    (row,) = source.demonstrations()
    assert (row.prompt.id, row.prompt.task, row.answer) == ("alpaca:0", "alpaca", "3")
    assert asked[0] == ("tatsu-lab/alpaca", {"name": None, "split": "train[:10]", "revision": "abc"})


def test_reads_the_public_data(shared_data: Path) -> None:
    tasks = FileDemonstrations(shared_data / "instruct/self_instruct_seed_tasks.jsonl", SelfInstruct(), id="id")
    assert len(tasks.demonstrations()) == 175
    problems = FileDemonstrations(shared_data / "gsm8k/train.jsonl", GSM8K(cut_answer=True)).demonstrations()
    assert len(problems) == 7473
    assert not any("####" in row.answer for row in problems)
