"""A study's YAML becomes cells named by what they depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from frpo.cli.study import shard
from frpo.foundation.errors import ConfigError
from frpo.study.cells import Cell, expand, replaced
from frpo.study.factors import factors_of
from frpo.study.reading import read_study
from frpo.study.spec import overlaid
from frpo.study.spelling import flat, spelled_out

LAM = "model.objective.lam"
LONG = "model.init_args.objective.init_args.lam"
LR = "model.optimizer.lr"


def study() -> dict[str, Any]:
    return {
        "name": "small",
        "seeds": [0, 1],
        "methods": {
            "base": {"policy": {"class_path": "frpo.tiny.policy.TinyPolicy", "init_args": {"seed": "${study.seed}"}}},
            "GRPO": {"from": "base", "config": ["recipes/tiny/grpo.yaml"]},
            "FRPO": {
                "from": "base",
                "config": ["recipes/tiny/frpo.yaml"],
                "factors": {"beta": 0.05},
                "grid": {"lambda": {"key": LAM, "values": [1.0, 0.3]}},
            },
        },
        "downstream": {"comply": {"config": ["recipes/tiny/grpo.yaml"], "grid": {"lr": {"key": LR, "values": [1e-3]}}}},
        "evaluation": {"suites": {"risky": {"scores": {"safety": 1}, "kl_to": {"start": "x"}}}, "at_steps": [10]},
        "report": {"baseline": "GRPO"},
    }


def read(tmp_path: Path, tree: dict[str, Any]) -> Any:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_study(str(file))


def cells(tmp_path: Path, tree: dict[str, Any] | None = None) -> list[Cell]:
    return expand(read(tmp_path, tree or study()))


def test_a_grid_becomes_one_policy_a_point_and_each_is_fine_tuned(tmp_path: Path):
    found = cells(tmp_path)
    policies = [cell for cell in found if cell.kind == "policy"]
    assert [cell.method for cell in policies if cell.seed == 0] == [
        "base",
        "GRPO",
        "FRPO, lambda 1.0",
        "FRPO, lambda 0.3",
    ]
    assert len(found) == 2 * (4 + 4)
    frpo = next(cell for cell in policies if cell.method == "FRPO, lambda 0.3")
    assert frpo.factors == {
        "lambda": 0.3, "estimator": "jackknife", "beta": 0.05, "beta_scale": "objective", "kl": "full",
    }  # fmt: skip
    assert frpo.layers[-1]["model"]["objective"]["lam"] == 0.3
    assert frpo.layers[-1]["seed_everything"] == 0
    assert frpo.parent == policies[0].id
    tuned = [cell for cell in found if cell.parent == frpo.id]
    assert [cell.downstream for cell in tuned] == [{"lr": 1e-3}]
    assert tuned[0].reference == policies[0].id
    assert policies[0].policy == {"class_path": "TinyPolicy", "seed": 0}


def test_an_address_changes_with_what_the_result_depends_on_and_nothing_else(tmp_path: Path):
    before = {cell.title: cell.address for cell in cells(tmp_path)}
    same = study() | {"name": "other", "threads": 2, "report": {}}
    assert {cell.title: cell.address for cell in cells(tmp_path, same)} == before
    changed = study()
    changed["methods"]["GRPO"]["settings"] = {"trainer": {"max_steps": 3}}
    after = {cell.title: cell.address for cell in cells(tmp_path, changed)}
    assert {title for title in before if before[title] != after[title]} == {t for t in before if t.startswith("GRPO")}
    suites = study()
    suites["evaluation"]["suites"]["risky"]["seed"] = 1
    assert not set(before.values()) & {cell.address for cell in cells(tmp_path, suites)}


def test_a_seed_that_is_added_leaves_the_cells_of_the_others(tmp_path: Path):
    before = {cell.id for cell in cells(tmp_path)}
    assert before < {cell.id for cell in cells(tmp_path, study() | {"seeds": [0, 1, 2]})}


def test_a_factor_that_the_configuration_contradicts_is_refused(tmp_path: Path):
    tree = study()
    tree["methods"]["FRPO"]["factors"] = {"beta": 0.1, "note": "kept"}
    with pytest.raises(ConfigError, match=r"factors\.beta: got 0\.1, but the configuration of its run says 0\.05"):
        cells(tmp_path, tree)


def test_the_factors_of_a_default_are_those_of_the_class():
    for objective in ("FRPO", {"class_path": "FRPO"}, {"class_path": "FRPO", "estimator": "Jackknife"}):
        assert factors_of({"model": {"objective": objective}}) == {
            "lambda": 1.0, "estimator": "jackknife", "beta": 0.001, "beta_scale": "loss", "kl": "k3",
        }  # fmt: skip
    assert factors_of({"model": {}}) == {}


def test_two_cells_of_one_name_are_refused(tmp_path: Path):
    tree = study()
    tree["methods"]["GRPO!"] = tree["methods"]["GRPO"]
    with pytest.raises(ConfigError, match="two cells are both policy-grpo-"):
        cells(tmp_path, tree)


def test_shards_cover_the_study_and_bring_what_they_start_from(tmp_path: Path):
    found = cells(tmp_path)
    parts = [shard(found, f"{k}/3") for k in (1, 2, 3)]
    assert {cell.id for part in parts for cell in part} == {cell.id for cell in found}
    for part in parts:
        names = {cell.id for cell in part}
        assert all(cell.parent is None or cell.parent in names for cell in part)
    tuned = [cell.id for part in parts for cell in part if cell.kind == "downstream" and cell.method != "base"]
    assert len(tuned) == len(set(tuned)), "a downstream run is in one part"
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ConfigError, match="expected K/N"):
            shard(found, wrong)


def test_names_are_replaced_and_other_interpolations_left():
    tree = {"a": ["${study.start}/x", "${data_dir}"], "seed": "${study.seed}"}
    assert replaced(tree, {"start": "/p", "seed": "3"}) == {"a": ["/p/x", "${data_dir}"], "seed": 3}


def test_a_class_is_laid_over_another_with_its_settings():
    below = {"policy": {"class_path": "A", "x": 1}, "kept": 1}
    assert overlaid(below, {"policy": {"class_path": "B"}}) == {"policy": {"class_path": "B"}, "kept": 1}
    assert overlaid(below, {"policy": {"y": 2}})["policy"] == {"class_path": "A", "x": 1, "y": 2}
    assert overlaid({"policy": "A"}, {"policy": {"y": 2}}) == {"policy": {"class_path": "A", "y": 2}}


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"class_path": "frpo.objectives.FRPO", "init_args": {"ratio": "sequence"}}, LAM),
        ({"class_path": "frpo.objectives.FRPO", "init_args": {"ratio": "sequence"}}, LONG),
        ({"class_path": "FRPO", "init_args": {"ratio": "sequence"}}, LONG),
        ({"ratio": "sequence"}, LAM),
    ],
)
def test_a_cell_is_the_same_however_its_settings_are_spelled(tmp_path: Path, method: dict[str, Any], key: str):
    def addresses(objective: dict[str, Any], long: bool, grid: str) -> set[str]:
        tree = study()
        settings = {"init_args": {"objective": objective}} if long else {"objective": objective}
        tree["methods"]["FRPO"] |= {"settings": {"model": settings}, "grid": {"lambda": {"key": grid, "values": [0.3]}}}
        found = cells(tmp_path, tree)
        assert [c.factors["lambda"] for c in found if c.method == "FRPO, lambda 0.3" and c.seed == 0] == [0.3, 0.3]
        return {cell.address for cell in found}

    plain = {"class_path": "FRPO", "ratio": "sequence"} if "class_path" in method else method
    assert addresses(method, long=True, grid=key) == addresses(plain, long=False, grid=LAM)


def test_what_is_merged_flat_is_spelled_out_for_the_parser():
    written = {
        "model": {"class_path": "my.Model", "init_args": {"objective": {"class_path": "frpo.objectives.GRPO"}}},
        "trainer": {"callbacks": [{"class_path": "frpo.run.Progress", "init_args": {"refresh_rate": 2}}]},
    }
    short = flat(written)
    assert short == {
        "model": {"class_path": "my.Model", "objective": {"class_path": "GRPO"}},
        "trainer": {"callbacks": [{"class_path": "Progress", "refresh_rate": 2}]},
    }
    assert flat(spelled_out(short)) == short
    assert spelled_out(short)["model"]["init_args"] == {"objective": {"class_path": "GRPO"}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
        ({"seeds": "0"}, "seeds: got '0', expected a list of whole numbers"),
        ({"seeds": [-1]}, "seeds: got -1, expected a whole number from 0"),
        ({"threads": "two"}, "threads: got 'two', expected a whole number from 1"),
        ({"evaluation": {"suites": {"risky": {}}, "at_steps": 20}}, "at_steps: got 20, expected a list"),
        ({"tracking": {"uri": "x"}}, "tracking: uri: unknown key"),
        ({"tracking": {"tracking_uri": "${oc.env:FRPO_NO_SUCH}"}}, "tracking: .*FRPO_NO_SUCH"),
        ({"seeds": [0, 0]}, "names one twice"),
        ({"methods": {}}, "methods: got none"),
        ({"methods": {"GRPO": {"config": ["recipes/tiny/grpo.yaml"]}}}, "from: missing"),
        ({"methods": {"GRPO": {"from": "base", "config": ["recipes/tiny/grpo.yaml"]}}}, "'base' is no method given"),
        ({"methods": {"base": {}}}, "expected either `config: \\[RECIPE\\]`"),
        ({"downstream": {"comply": {}}}, "downstream.comply: config: missing"),
        ({"downstream": {"comply": {"config": ["recipes/tiny/nothing.yaml"]}}}, "no file recipes/tiny/nothing.yaml"),
        ({"evaluation": {}}, "evaluation: got no suites"),
        ({"report": {"safty": "a/b"}}, "safty: unknown key; did you mean safety"),
        ({"report": {"baseline": "FRPO"}}, "report.baseline: no method 'FRPO'; did you mean"),
        ({"report": {"primary": "FRPO, lambda 3"}}, "report.primary: no method .* did you mean FRPO, lambda 0.3"),
        ({"report": {"safety": "risky/saftey"}}, "report.safety: nothing measures .* did you mean risky/safety"),
        ({"report": {"tasks": {"comply": "risky/x"}}}, "report.tasks.comply: nothing measures"),
        ({"report": {"tasks": {"comly": "risky/safety"}}}, "tasks: comly: unknown key; did you mean comply"),
        ({"methods": {"base": {"policy": {}, "grid": {}}}}, "base: grid: a `policy` is taken as it is"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_what_to_write(tmp_path: Path, change: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, study() | change)


def test_a_start_with_a_grid_is_refused(tmp_path: Path):
    tree = study()
    tree["methods"]["more"] = {"from": "FRPO", "config": ["recipes/tiny/grpo.yaml"]}
    with pytest.raises(ConfigError, match="'FRPO' has a grid"):
        read(tmp_path, tree)


def test_an_axis_without_values_is_refused(tmp_path: Path):
    tree = study()
    tree["methods"]["FRPO"]["grid"] = {"lambda": {"key": LAM}}
    with pytest.raises(ConfigError, match=r"grid\.lambda: expected `key`"):
        read(tmp_path, tree)
