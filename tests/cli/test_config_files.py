from pathlib import Path

import pytest
import yaml

from frpo.cli.references import restore_references
from frpo.foundation.errors import ConfigError
from frpo.foundation.yaml_files import load_text, read_with_includes


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def trees(path: str) -> list[dict]:
    return [document.tree for document in read_with_includes(path)]


def test_includes_come_first_in_order_recursively_and_beside_the_file_that_names_them(folder):
    write(folder / "sub/inner.yaml", "a: 1")
    write(folder / "sub/outer.yaml", "include: [inner.yaml]\na: 2")
    write(folder / "recipe.yaml", "include: [sub/outer.yaml, conf/trainer/cpu.yaml]\na: 3")
    found = trees("recipe.yaml")
    assert found[:2] == [{"a": 1}, {"a": 2}]
    assert found[-1] == {"a": 3}
    assert any("accelerator" in tree.get("trainer", {}) for tree in found)


def test_a_file_of_ones_own_stands_before_a_shipped_one(folder):
    write(folder / "conf/trainer/cpu.yaml", "mine: 1")
    assert trees("conf/trainer/cpu.yaml") == [{"mine": 1}]


def test_shipped_files_are_found_from_anywhere(folder):
    assert trees("conf/objective/grpo.yaml") == [{"model": {"objective": "GRPO"}}]


def test_a_file_included_twice_is_no_circle(folder):
    write(folder / "a.yaml", "x: 1")
    write(folder / "b.yaml", "include: [a.yaml]")
    write(folder / "c.yaml", "include: [a.yaml, b.yaml]")
    assert trees("c.yaml") == [{"x": 1}, {"x": 1}, {}, {}]


def test_a_circle_of_includes_is_refused_with_its_links(folder):
    write(folder / "a.yaml", "include: [b.yaml]")
    write(folder / "b.yaml", "include: [a.yaml]")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_with_includes("a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1, 2\nc: 3", "bad.yaml, line 3, column"),
        ("trainer:\n\tmax_steps: 1", "bad.yaml, line 2, column 1"),
        ("a: 1\nb: 2\na: 3", "'a' is given twice in one mapping (first given in line 1)"),
        ("x:\n  a: 1\n  a: 2", "bad.yaml, line 3, column 3"),
        ("- 1\n- 2", "got a list at the top level"),
        ("include: conf/trainer/cpu.yaml", "expected a list of paths"),
        ("include: [nowhere.yaml]", "bad.yaml: include: no file nowhere.yaml"),
        ("include: [conf/trainer/cpuu.yaml]", "did you mean conf/trainer/cpu.yaml"),
        ("include: [sub]", "sub is a folder"),
        ("a: !!python/object/apply:os.system [true]", "line 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(folder, text, said):
    (folder / "sub").mkdir()
    write(folder / "bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_with_includes("bad.yaml")
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_answered_with_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"no file bse\.yaml.*did you mean base\.yaml\?"):
        read_with_includes("bse.yaml")


def test_a_file_that_is_no_text_is_refused(folder):
    (folder / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.yaml: cannot be read as text"):
        read_with_includes("bad.yaml")


def test_an_empty_file_is_an_empty_configuration(folder):
    write(folder / "empty.yaml", "# nothing yet\n")
    assert trees("empty.yaml") == [{}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("-.5", -0.5),
        ("10", 10),
        ("1e3x", "1e3x"),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
    ],
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert load_text(text, "here") == value


def test_references_are_restored_where_they_stand_and_nowhere_else():
    text = yaml.safe_dump(
        {"out": "o/a", "t": [{"dir": "o/a"}], "key": "secret", "model": {"init_args": {"policy": "o/a"}}}
    )
    references = {
        "t[0].dir": "${out}",
        "key": "${oc.env:KEY}",
        "model.init_args.policy": "${out}",
        "t[3].dir": "${out}",
        "gone.x": "${out}",
    }
    restored = yaml.safe_load(restore_references(text, references))
    assert restored == {
        "out": "o/a",
        "t": [{"dir": "${out}"}],
        "key": "secret",
        "model": {"init_args": {"policy": "o/a"}},
    }
