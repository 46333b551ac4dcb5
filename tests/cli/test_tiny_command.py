import csv
from pathlib import Path

import pytest

from frpo.cli.tiny import report

SHORT = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
SMALL = [
    "--model.group_size",
    "3",
    "--data.batch_size",
    "4",
    "--data.val_batch_size",
    "8",
    "--model.policy.steps",
    "15",
]
QUICK = ["--model.lr_schedule", "null", "--model.optimizer.lr", "0.02"]


def table(out: str) -> dict[str, dict[str, float]]:
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["reward"])
    header = lines[start].replace("worst case", "worst").split()
    rows = (line.split() for line in lines[start + 1 : start + 4])
    return {row[0]: dict(zip(header, map(float, row[1:]), strict=True)) for row in rows}


def last_validation(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/reward"]]
    return {name: float(value) for name, value in rows[-1].items() if value}


def test_the_comparison_trains_both_methods_and_prints_what_they_logged(folder, frpo, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, out, err = frpo("tiny", *SHORT, *SMALL, *QUICK)
    assert status == 0, err
    rows = table(out)
    assert list(rows) == ["start", "FRPO", "GRPO"]
    assert rows["start"]["KL"] == 0.0
    for method in ("FRPO", "GRPO"):
        logged = last_validation(folder / "outputs/tiny" / method.lower())
        names = {"reward": "reward", "risky": "reward/risky", "benign": "reward/benign", "KL": "kl_sequence"}
        for column, name in {**names, "worst": "worst_case_reward"}.items():
            assert rows[method][column] == pytest.approx(logged[f"val/{name}"], abs=6e-4), (method, column)
    assert rows["FRPO"] != rows["start"]
    assert "sqlite:///mlflow.db" in out
    assert (folder / "mlflow.db").is_file()
    assert (folder / "outputs/tiny/frpo/config.yaml").is_file()


def test_the_table_holds_the_numbers_it_is_given_and_no_others():
    metrics = {"val/reward": 0.125, "val/reward/easy": 0.5, "val/kl_sequence": 2.0, "val/worst_case_reward": -1.0}
    config = {"model": {"init_args": {"rho": 0.7}}, "trainer": {"logger": False}}
    text = report({"only": metrics}, config)
    assert "only           0.125       0.500       2.000      -1.000" in text
    assert "within 0.7 nats" in text
    assert "mlflow" not in text
    del metrics["val/worst_case_reward"]
    assert "only           0.125       0.500       2.000           -" in report({"only": metrics}, config)
