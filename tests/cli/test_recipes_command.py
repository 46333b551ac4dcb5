import pytest
import yaml

from frpo.cli.recipes import names
from frpo.foundation.shipped import shipped


def test_ls_lists_every_recipe_with_its_first_line(frpo):
    status, out, _ = frpo("recipes", "ls")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == len(list(shipped("recipes").rglob("*.yaml"))) > 0
    assert all(line.split(maxsplit=1)[0] in names() and len(line.split()) > 2 for line in lines)


def test_ls_lists_studies_by_a_line_that_ends(frpo):
    lines = [line for line in frpo("recipes", "ls")[1].splitlines() if line.startswith("studies/")]
    assert {"studies/tiny", "studies/tiny_controls", "studies/published_safety"} <= {line.split()[0] for line in lines}
    assert all(line.endswith((".", "?")) for line in lines), lines


@pytest.mark.parametrize(
    ("name", "file"),
    [("tiny/frpo", "tiny/frpo"), ("recipes/tiny/frpo.yaml", "tiny/frpo"), ("studies/tiny", "studies/tiny")],
)
def test_show_prints_the_file(frpo, name, file):
    assert frpo("recipes", "show", name)[1] == (shipped("recipes") / f"{file}.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("studies/tiny", "frpo study run mine.yaml"),
        ("reward_model/refusal_agreement", "frpo agreement --config mine.yaml --data_dir DIR"),
        ("recipes/downstream/gsm8k.yaml", "frpo fit --config mine.yaml --model.policy.path DIR --data_dir DIR"),
    ],
)
def test_cp_says_how_the_copy_is_run(folder, frpo, name, command):
    status, out, _ = frpo("recipes", "cp", name, "mine.yaml")
    assert status == 0
    assert out == f"mine.yaml: change it, then run `{command}`\n"


def test_cp_copies_a_recipe_that_still_works(folder, frpo):
    status, out, _ = frpo("recipes", "cp", "tiny/frpo", "mine.yaml")
    assert status == 0
    assert "frpo fit --config mine.yaml" in out
    original = frpo("fit", "--config", "recipes/tiny/frpo.yaml", "--print_config")
    assert frpo("fit", "--config", "mine.yaml", "--print_config") == original
    assert original[0] == 0


def test_cp_names_neighbours_so_that_they_are_found_and_keeps_comments(folder, frpo, monkeypatch):
    root = folder / "package"
    (root / "recipes/set").mkdir(parents=True)
    (root / "recipes/set/base.yaml").write_text("name: base")
    (root / "recipes/set/top.yaml").write_text(
        "# Title.\ninclude:\n  - base.yaml  # first\n  - conf/x.yaml\nname: top\n"
    )
    (root / "conf").mkdir()
    (root / "conf/x.yaml").write_text("seed_everything: 1")
    for module in ("cli.recipes", "foundation.shipped", "foundation.yaml_files"):
        monkeypatch.setattr(f"frpo.{module}.shipped", lambda kind: root / kind)
    assert frpo("recipes", "cp", "set/top", "new/")[0] == 0
    text = (folder / "new/top.yaml").read_text()
    assert "  - recipes/set/base.yaml  # first\n" in text
    assert yaml.safe_load(text)["include"] == ["recipes/set/base.yaml", "conf/x.yaml"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["show", "tiny/frppo"], "did you mean tiny/frpo"),
        (["lss"], "did you mean ls?"),
        (["show"], "got 0 arguments, expected 1"),
        (["cp", "tiny/frpo", "base.yaml"], "base.yaml exists"),
        ([], "usage: frpo recipes"),
    ],
)
def test_mistakes_are_answered(folder, frpo, args, said):
    status, _, err = frpo("recipes", *args)
    assert status == 2
    assert said in err
