"""``frpo agreement`` from configuration to table, on rules and on a probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from frpo.evaluation.label_agreement import LabelAgreement, stratified_folds

CONFIG = """
agreement:
  labels:
    class_path: frpo.data.preferences.sources.Labels
    init_args:
      source:
        class_path: frpo.data.prompts.sources.FileSource
        init_args: {path: "${data_dir}/rows.jsonl", task: null, default_task: t}
  rewards:
    phrases: {class_path: frpo.rewards.rules.RefusalPhrases}
    quick: {class_path: frpo.rewards.rules.Regex, init_args: {pattern: sorry}}
  resamples: 50
  folds: 3
"""
PROBE = (
    "  probes: {probe: {base: {class_path: frpo.models.policy.Policy, init_args: {path: MODEL}}, max_length: 128}}\n"
)


@pytest.fixture
def config(folder: Path) -> Path:
    rows = [
        {
            "prompt": f"w{i}",
            "response": f"w{i} I can't assist with that, sorry" if i % 2 else f"w{i} w2 sure",
            "label": i % 2,
        }
        for i in range(30)
    ]
    rows[0]["label"] = 1
    rows[1]["response"] = "w1 sure"
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "agreement.yaml"
    path.write_text(CONFIG)
    return path


def test_rules_are_measured(config: Path, frpo) -> None:
    status, out, err = frpo("agreement", "--config", str(config), "--out", "found.json")
    assert status == 0, err
    assert "phrases" in out
    found = json.loads(Path("found.json").read_text())
    phrases = found["phrases"]
    # 14 refusals found, 2 of 16 labelled rows missed, none of 14 others taken for one.
    assert phrases["metrics"]["accuracy"]["value"] == pytest.approx(28 / 30)
    assert phrases["metrics"]["balanced_accuracy"]["value"] == pytest.approx((14 / 16 + 1) / 2)
    assert phrases["metrics"]["auroc"]["value"] == pytest.approx((14 + 2 * 0.5) / 16)
    assert (phrases["rows"], phrases["failed"], phrases["abstained"]) == (30, 0, 0)
    assert "0.933 (" in out


def test_a_probe_is_measured_out_of_fold(config: Path, frpo, model_dir: Path) -> None:
    config.write_text(CONFIG + PROBE.replace("MODEL", str(model_dir)))
    status, _, err = frpo("agreement", "--config", str(config), "--out", "found.json")
    assert status == 0, err
    probe = json.loads(Path("found.json").read_text())["probe"]
    assert probe["rows"] == 30
    assert probe["metrics"]["auroc"]["value"] > 0.7


def test_what_is_wrong_is_said_in_short(config: Path, frpo) -> None:
    (config.parent / "data/rows.jsonl").write_text('{"prompt": "a", "response": "b", "label": 2}\n')
    status, _, err = frpo("agreement", "--config", str(config))
    assert status == 2
    assert "row rows:0: the label is 2, expected 0 or 1" in err
    assert "Traceback" not in err
    status, _, err = frpo("agreement", "--config", str(config), "--agreement.folds", "1")
    assert status == 2
    assert "folds: got 1" in err
    status, _, err = frpo("agreement", "--config", str(config), "--agreement.rewards", "null")
    assert status == 2
    assert "got neither" in err


def test_copies_stand_in_one_fold_and_labels_in_all() -> None:
    labels = np.tile([0, 0, 1], 40)
    groups = np.arange(120) // 3
    folds = stratified_folds(labels, groups, 4, seed=0)
    for group in range(40):
        assert len(set(folds[groups == group])) == 1
    assert [labels[folds == fold].mean() for fold in range(4)] == pytest.approx([1 / 3] * 4)
    assert (stratified_folds(labels, groups, 4, seed=1) != folds).any()


def test_pairs_have_no_labels_to_agree_with() -> None:
    from frpo.tiny.preferences import TinyPreferences

    with pytest.raises(ValueError, match="expected labelled responses"):
        LabelAgreement(TinyPreferences())


def test_the_shipped_measurement_reads_the_labels(shared_data: Path, folder: Path, frpo) -> None:
    status, out, err = frpo(
        "agreement",
        "--config",
        "recipes/reward_model/refusal_agreement.yaml",
        "--data_dir",
        str(shared_data),
        "--agreement.probes=null",
        "--agreement.resamples=20",
    )
    assert status == 0, err
    assert "0.692 (" in out, "the accuracy the recipe's header gives"
