import csv
import json
import sys
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from frpo.data import readers
from frpo.data.prompts.sources import FileSource, HubSource, JoinedSource, PromptSource
from frpo.data.rows import kind
from frpo.types import Prompt

PUBLISHED = {"wildjailbreak": "safety", "rainbow": "safety", "aegis": "safety", "refusal": "normal"}
ROWS = [
    {"prompt": "w1 w2", "task": "safety", "answer": "3", "extra": {"index": 1}},
    {"prompt": "w3", "task": "normal", "answer": "4", "extra": {"index": 2}},
]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def said(error: pytest.ExceptionInfo) -> str:
    return str(error.value)


# What is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    rows = [{key: value for key, value in row.items() if key != "extra"} for row in ROWS]
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    assert FileSource(path).prompts() == [
        Prompt("rows:0", ({"role": "user", "content": "w1 w2"},), "safety", {"answer": "3"}),
        Prompt("rows:1", ({"role": "user", "content": "w3"},), "normal", {"answer": "4"}),
    ]


def test_nested_columns_become_fields(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert [prompt.fields for prompt in FileSource(path).prompts()] == [
        {"answer": "3", "extra": {"index": 1}},
        {"answer": "4", "extra": {"index": 2}},
    ]


def test_fields_are_json_values(tmp_path: Path) -> None:
    rows = [{"prompt": "w", "task": "t", "day": date(2024, 1, 2), "price": Decimal("1.50"), "score": float("nan")}]
    (prompt,) = FileSource(write_parquet(tmp_path / "rows.parquet", rows)).prompts()
    assert prompt.fields == {"day": "2024-01-02", "price": "1.50", "score": None}
    json.dumps(prompt.fields, allow_nan=False)


@pytest.mark.parametrize(("value", "words"), [(b"x", "a bytes"), (float("inf"), "inf")])
def test_a_column_json_cannot_hold_is_refused(tmp_path: Path, value: object, words: str) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [{"prompt": "w", "task": "t", "blob": value}])
    with pytest.raises(ValueError, match=f"row 1: column 'blob': the value is {words}; expected"):
        FileSource(path).prompts()


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "w0", "name": "left out"},
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    (prompt,) = FileSource(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": chat, "task": "t"}])).prompts()
    assert [(m["role"], m["content"]) for m in prompt.messages] == [
        ("system", "w0"),
        ("user", "w1"),
        ("assistant", "w2"),
        ("user", "w3"),
    ]
    assert set(prompt.messages[0]) == {"role", "content"}


def test_system_message_comes_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    prompt = FileSource(path, system="w9").prompts()[0]
    assert prompt.messages == ({"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"})


def test_a_second_system_message_is_refused(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": chat, "task": "t"}])
    with pytest.raises(ValueError, match=r"line 1: the prompt has a system message of its own.*`system: null`"):
        FileSource(path, system="w9").prompts()


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nnot json\n")
    assert len(FileSource(path, limit=1).prompts()) == 1
    with pytest.raises(ValueError, match="line 2"):
        FileSource(path, limit=2).prompts()


def test_ids_from_a_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w", "task": "t", "key": key} for key in (7, "b")])
    prompts = FileSource(path, id="key").prompts()
    assert [prompt.id for prompt in prompts] == ["7", "b"]
    assert prompts[0].fields == {}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"key": 1}, {"key": 1}], r"column 'key': 1 ids stand for more than one prompt, the first '1'.*`id: null`"),
        ([{"key": 1}, {"key": None}], r"line 2: the id in column 'key' is null, expected .*`id: null`"),
        ([{"key": ""}], r"line 1: the id in column 'key' is empty"),
        ([{"key": [1]}], r"line 1: the id in column 'key' is a list of 1"),
        ([{"key": "\ud800"}], r"line 1: column 'key': a string holds half of a surrogate pair"),
        ([{"keys": 1}], r"no column 'key' \(the id column\).*Did you mean 'keys'\?"),
    ],
)
def test_bad_ids(tmp_path: Path, rows: list, words: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w", "task": "t", **row} for row in rows])
    with pytest.raises(ValueError, match=words):
        FileSource(path, id="key").prompts()


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\r\n" + json.dumps(ROWS[1]).encode())
    assert len(FileSource(path).prompts()) == 2


def test_csv_cells_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [{"prompt": 'a, "b"\nc', "task": "t"}, {"prompt": "d", "task": "t"}])
    assert FileSource(path).prompts()[0].messages[0]["content"] == 'a, "b"\nc'


def test_a_source_reads_the_same_twice(tmp_path: Path) -> None:
    source = FileSource(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    assert source.prompts() == source.prompts()


def test_constructing_reads_nothing() -> None:
    FileSource("/nowhere/rows.jsonl")
    HubSource("nobody/nothing")


def test_joined_sources_follow_each_other(tmp_path: Path) -> None:
    first = FileSource(write_jsonl(tmp_path / "a.jsonl", ROWS), limit=1)
    second = FileSource(write_jsonl(tmp_path / "b.jsonl", ROWS))
    joined = JoinedSource([first, second])
    assert joined.prompts() == first.prompts() + second.prompts()
    assert [prompt.id for prompt in joined.prompts()] == ["a:0", "b:0", "b:1"]
    with pytest.raises(ValueError, match="joined sources: 1 ids stand for more than one prompt, the first 'a:0'"):
        JoinedSource([first, first]).prompts()
    with pytest.raises(ValueError, match=r"JoinedSource\.sources: got \[\]"):
        JoinedSource([])


def test_joined_sources_are_all_prepared() -> None:
    class Counted(PromptSource):
        prepared = 0

        def prepare(self) -> None:
            Counted.prepared += 1

        def prompts(self) -> list[Prompt]:
            return []

    JoinedSource([Counted(), Counted()]).prepare()
    assert Counted.prepared == 2


# Tasks ---------------------------------------------------------------------------------------------------------------


def tasks(path: Path, **options) -> list[str]:
    return [prompt.task for prompt in FileSource(path, **options).prompts()]


def test_task_map(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "w", "ability": a} for a in ("aegis", "refusal")])
    assert tasks(path, task="ability", task_map=PUBLISHED) == ["safety", "normal"]


def test_default_task_fills_empty_cells_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "w", "task": "a"}, {"prompt": "w", "task": None}, {"prompt": "w", "task": ""}, {"prompt": "w"}]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    assert tasks(path, default_task="b") == ["a", "b", "b", "b"]
    assert tasks(path, task_map={"a": "c"}, default_task="b") == ["c", "b", "b", "b"]
    assert tasks(path, task=None, default_task="b") == ["b"] * 4
    with pytest.raises(ValueError, match=r"line 2: no task in column 'task'.*`default_task`"):
        tasks(path)


def test_unmapped_values_are_all_listed_with_their_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "w", "task": task} for task in "aabccc"])
    with pytest.raises(ValueError, match=r"holds 2 values.*\{'c': 3, 'a': 2\}.*it names \['b'\].*Add each") as error:
        tasks(path, task_map={"b": "safety"}, default_task="normal")
    assert "'task'" in said(error)


def test_a_missing_task_column_names_the_nearest_and_the_way_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "w", "ability": "aegis"}])
    with pytest.raises(
        ValueError, match=r"no column 'abilty'.*\['ability', 'prompt'\]. Did you mean 'ability'\?.*`task: null`"
    ):
        tasks(path, task="abilty", default_task="normal")


@pytest.mark.parametrize("value", [1, True, ["a"], {"a": 1}])
def test_a_task_is_a_string(tmp_path: Path, value: object) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "w", "task": value}])
    with pytest.raises(ValueError, match=f"line 1: the task in column 'task' is {kind(value)}, expected"):
        tasks(path)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit: got 0, expected at least 1"),
        ({"limit": -3}, "limit: got -3"),
        ({"task": None}, "task and default_task are both null"),
        ({"task": None, "default_task": "a", "task_map": {"a": "b"}}, "task_map is set but `task` is null"),
        ({"task_map": {"a": " "}}, "task_map: got an empty task"),
        ({"default_task": ""}, "default_task: got '', expected text"),
        ({"system": " "}, "system: got ' ', expected text"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FileSource("rows.jsonl", **options)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no file at .*trian\.jsonl\. Did you mean 'train\.jsonl'\?"):
        FileSource(tmp_path / "trian.jsonl").prompts()
    with pytest.raises(FileNotFoundError, match=r"The folder .*nowhere does not exist either"):
        FileSource(tmp_path / "nowhere" / "train.jsonl").prompts()


def test_a_folder_stands_for_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "third", "task": "t"}\n')
    (tmp_path / "a.csv").write_text("prompt,task\nfirst,t\nsecond,t\n")
    (tmp_path / "notes.txt").write_text("not a table")
    prompts = FileSource(tmp_path).prompts()
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["first", "second", "third"]
    assert len({prompt.id for prompt in prompts}) == 3
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"c\.jsonl"):
        FileSource(tmp_path).prompts()


def test_a_folder_without_files_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder without files to read"):
        FileSource(tmp_path).prompts()


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.jsonl.gz"])
def test_an_unknown_suffix_lists_the_known(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        ValueError, match=r"got suffix .*, expected one of \['\.csv', '\.json', '\.jsonl', '\.parquet'\]"
    ):
        FileSource(tmp_path / name).prompts()


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.touch()
    with pytest.raises(ValueError, match="is empty; expected at least one row"):
        FileSource(path).prompts()


@pytest.mark.parametrize(("name", "text"), [("r.jsonl", "\n \n"), ("r.json", "[]"), ("r.csv", "prompt,task\n")])
def test_a_file_without_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="holds no rows; expected at least one prompt"):
        FileSource(tmp_path / name).prompts()


def test_a_missing_prompt_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompts": "w", "task": "t"}])
    with pytest.raises(
        ValueError,
        match=r"line 1: no column 'prompt' \(the prompt column\).*\['prompts', 'task'\]. Did you mean 'prompts'",
    ):
        FileSource(path).prompts()


OK_LINE = b'{"prompt": "w", "task": "t"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "secret", ', "malformed JSON at column"),
        (b"secret", "malformed JSON at column 1"),
        (b'["secret"]', "got a list of 1, expected an object"),
        (b'"secret"', "got a str, expected an object"),
        (b'{"prompt": "w", "task": "t", "x": NaN}', "NaN is not JSON; write null"),
        (b'{"prompt": "secret \xe9", "task": "t"}', "byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b'{"prompt": "secret \\ud83d", "task": "t"}', "half of a surrogate pair"),
        (b'{"prompt": "w", "task": "t", "x": ["\\udc00"]}', "column 'x': a string holds half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (
            b'{"prompt": "w", "task": "t", "x": ' + b"[" * 99 + b"]" * 99 + b"}",
            "column 'x': the value is nested deeper",
        ),
        (b'{"prompt": "w", "task": "t", "x": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b'{"prompt": "w", "task": "t", "x": 1e999}', "column 'x': the value is inf"),
        (b'{"prompt": "", "task": "t"}', "message 1 of the prompt has an empty 'content'"),
        (b'{"prompt": " \\n", "task": "t"}', "message 1 of the prompt has an empty 'content'"),
        (b'{"prompt": null, "task": "t"}', "the prompt is null; expected a string or a non-empty list"),
        (b'{"prompt": 3, "task": "t"}', "the prompt is an int; expected"),
        (b'{"prompt": [], "task": "t"}', "the prompt is a list of 0; expected"),
        (b'{"prompt": ["secret"], "task": "t"}', "message 1 of the prompt is a str; expected"),
        (
            b'{"prompt": [{"from": "human", "value": "x"}], "task": "t"}',
            "null for 'role'.*its keys are .'from', 'value'",
        ),
        (b'{"prompt": [{"role": "user", "content": ["x"]}], "task": "t"}', "message 1 .* a list of 1 for 'content'"),
        (b'{"prompt": [{"role": " ", "content": "x"}], "task": "t"}', "message 1 of the prompt has an empty 'role'"),
        (
            b'{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "secret"}], "task": "t"}',
            "the last message of the prompt has role 'assistant'",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(OK_LINE + b"\n" + line + b"\n" + OK_LINE)
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{words}") as error:
        FileSource(path).prompts()
    assert "secret" not in said(error)


def test_a_line_too_long_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(OK_LINE + b'{"prompt": "' + b"x" * 100 + b'", "task": "t"}\n')
    with pytest.raises(ValueError, match="line 2: longer than 100 bytes"):
        FileSource(path).prompts()


def test_json_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    for content, words in [
        (b'{"prompt": "w"}', "got a dict at the top, expected a list of objects"),
        (b'[{"prompt": "w", "task": "t"},\n3]', "row 2: got an int, expected an object"),
        (b'[{"prompt": "w", "task": "t"},\n{]', "line 2: malformed JSON at column 2"),
        (b'[{"prompt": "w",\n"task": "\xff"}]', "line 2: byte 0xff is not UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            FileSource(path).prompts()
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match=r"is parsed whole, up to 10: write \.jsonl"):
        FileSource(path).prompts()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt,task\nw,t\nw,t,u\n", "line 3: got 3 cells, expected 2"),
        (b"prompt,task\nw\n", "line 2: got 1 cells, expected 2"),
        (b'prompt,task\n"w" x,t\n', "line 2: malformed CSV"),
        (b'prompt,task\n"w,t\n', "line 2: malformed CSV"),
        (b"prompt,prompt\nw,t\n", "name the columns, each once"),
        (b"prompt,\nw,t\n", "name the columns, each once"),
        (b"prompt,task\nw,t\n\xff,t\n", "line 3: byte 0xff is not UTF-8"),
        (b"prompt,task\n" + b"x" * 200_000 + b",t\n", "line 2: malformed CSV: field larger than"),
    ],
)
def test_csv_faults(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        FileSource(path).prompts()


def test_a_table_without_a_header_shows_no_whole_text(tmp_path: Path) -> None:
    text = "w " * 100
    path = tmp_path / "rows.csv"
    path.write_text(f"{text},safety\n{text},safety\n")
    with pytest.raises(ValueError, match="no column 'task'") as error:
        FileSource(path).prompts()
    assert text not in said(error)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS * 500)
    whole = path.read_bytes()
    for damaged in (b"PAR1 not", whole[: len(whole) // 2], whole[:4] + b"\xff" * 200 + whole[204:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable parquet file after row"):
            FileSource(path).prompts()


# Fuzz ----------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = st.one_of(
    st.binary(max_size=40),
    st.fixed_dictionaries({}, optional={"prompt": JSON, "task": JSON, "x": JSON}).map(
        lambda row: json.dumps(row).encode()
    ),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.just(OK_LINE),
)


@given(lines=st.lists(LINES, max_size=4))
@example(lines=[OK_LINE, b"\xef\xbb\xbf{}"])
@example(lines=[b'{"prompt": "w", "task": "t", "\\ud800": 1}'])
@example(lines=[b'{"prompt": "w", "task": "t", "x": {"\\ud800": 1}}'])
@example(lines=[b'{"prompt": "w", "task": "\\ud800"}'])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_prompts_or_our_own_error(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    prompts, refused = [], None
    try:
        prompts = FileSource(path).prompts()
    except ValueError as error:
        refused = error
    assert prompts or (type(refused) is ValueError and "fuzz.jsonl" in str(refused)), repr(refused)
    for prompt in prompts:
        assert prompt.task
        assert all(message["content"].strip() for message in prompt.messages)
        json.dumps([prompt.id, prompt.task, prompt.fields], allow_nan=False, ensure_ascii=False).encode("utf-8")


# Published files and the hub -----------------------------------------------------------------------------------------


def test_published_training_set(shared_data: Path) -> None:
    path = shared_data / "frpo" / "train_lambda_0.5.parquet"
    prompts = FileSource(path, task="ability", task_map=PUBLISHED).prompts()
    assert Counter(prompt.task for prompt in prompts) == {"safety": 1000, "normal": 1000}
    assert len({prompt.id for prompt in prompts}) == 2000
    assert {tuple(m["role"] for m in prompt.messages) for prompt in prompts} == {("user",)}
    assert set(prompts[0].fields) == {"data_source", "reward_model", "extra_info"}
    json.dumps([dict(prompt.fields) for prompt in prompts], allow_nan=False)
    with pytest.raises(ValueError, match=r"holds 1 values.*\{'aegis': \d+\}"):
        FileSource(path, task="ability", task_map={k: v for k, v in PUBLISHED.items() if k != "aegis"}).prompts()


@pytest.mark.parametrize("task", ["safety", "normal"])
def test_published_evaluation_sets(shared_data: Path, task: str) -> None:
    path = shared_data / "frpo" / f"{task}.jsonl"
    prompts = FileSource(path).prompts()
    assert {prompt.task for prompt in prompts} == {task}
    assert len(prompts) == 1000
    by_ability = FileSource(path, task="ability", task_map=PUBLISHED, limit=50).prompts()
    assert [prompt.task for prompt in by_ability] == [task] * 50


def test_without_the_hub_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install frpo\[hub\]"):
        HubSource("owner/name").prompts()
    with pytest.raises(ImportError, match=r"pip install frpo\[hub\]"):
        HubSource("owner/name").prepare()


def test_hub_rows_are_read_like_a_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options):
        asked.append((path, options))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source = HubSource("owner/name", split="test", subset="main", revision="abc", limit=1)
    (prompt,) = source.prompts()
    assert (prompt.id, prompt.task) == ("name:0", "safety")
    assert asked == [("owner/name", {"name": "main", "split": "test", "revision": "abc"})]
    with pytest.raises(ValueError, match=r"owner/name \(train\), row 1: no column 'text'"):
        HubSource("owner/name", prompt="text").prompts()
