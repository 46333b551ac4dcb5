"""Preference pairs and labelled rows from files, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frpo.data.preferences.sources import Labels, Preferences
from frpo.data.prompts.sources import FileSource

ASKED = [{"role": "user", "content": "2 + 2?"}]


def source(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> FileSource:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(path=path, task=None, default_task="preference", **settings)


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", **changes}


def test_pairs_of_strings(tmp_path: Path) -> None:
    rows = [pair(), pair(chosen="four", sure=2)]
    examples = Preferences(source(tmp_path, *rows), margin=None).examples()
    assert [e.responses for e in examples] == [("4", "5"), ("four", "5")]
    assert [e.target for e in examples] == [0.0, 0.0]
    assert [c.text for c in examples[0].completions()] == ["4", "5"]
    assert examples[0].prompt.messages[0]["content"] == "2 + 2?"
    (only,) = Preferences(source(tmp_path, pair(sure=2)), margin="sure").examples()
    assert only.target == 2.0


@pytest.mark.parametrize("before", [[], ASKED])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_pairs_of_messages(tmp_path: Path, before, system) -> None:
    row = pair(
        chosen=[*before, {"role": "assistant", "content": "4"}],
        rejected=[*before, {"role": "assistant", "content": "5"}],
    )
    (example,) = Preferences(source(tmp_path, row, system=system)).examples()
    assert example.responses == ("4", "5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(rejected="4"), r"row rows:0: the responses in 'chosen' and 'rejected' are equal"),
        ({"prompt": "a", "chosen": "4", "rejectd": "5"}, r"no column 'rejected' .* Did you mean 'rejectd'\?"),
        (pair(chosen=3), "the response is an int"),
        (pair(chosen=" "), "the response in column 'chosen' is empty"),
        (pair(chosen=[]), "the response is a list of 0"),
        (pair(chosen=ASKED), "the last message has role 'user'"),
        (
            pair(chosen=[{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]),
            "the 1 messages before the response are not those of the prompt",
        ),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preferences(source(tmp_path, row)).examples()


def test_labels_are_numbers_also_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('# a comment, with a comma\nquestion,answer,refused\nhow,"I can\'t,\nsorry",1\nwhy,because,0\n')
    rows = FileSource(path=path, prompt="question", task=None, default_task="refusal", skip_lines=1)
    examples = Labels(rows, response="answer", label="refused").examples()
    assert [(e.prompt.messages[0]["content"], e.responses, e.target) for e in examples] == [
        ("how", ("I can't,\nsorry",), 1.0),
        ("why", ("because",), 0.0),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b", "label": "yes"}, "row rows:0: the label in column 'label' is text"),
        ({"prompt": "a", "response": "b", "label": None}, "the label in column 'label' is null"),
        ({"prompt": "a", "response": "b", "labels": 1}, r"no column 'label' .* Did you mean 'labels'\?"),
        ({"prompt": "a", "respons": "b", "label": 1}, r"no column 'response' .* Did you mean 'respons'\?"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels(source(tmp_path, row)).examples()


def test_lines_above_a_header_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("# one\n# two\nprompt,label\na,1\nb\n")
    with pytest.raises(ValueError, match="line 5: got 1 cells, expected 2"):
        FileSource(path=path, task=None, default_task="t", skip_lines=2).prompts()
    with pytest.raises(ValueError, match=r"skip_lines: got 1 .* only a \.csv"):
        source(tmp_path, pair(), skip_lines=1).prompts()
