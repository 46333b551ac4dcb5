import csv

from frpo.run.metrics_csv import MetricsCSV


def rows(folder, name="metrics.csv"):
    with (folder / name).open() as file:
        return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def test_new_metrics_become_columns_and_every_row_is_on_disk_at_once(tmp_path):
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"a": 1.5}, step=0)
    assert rows(tmp_path) == [{"step": "0", "a": "1.5"}]
    log.log_metrics({"b": 2.0, "a": 3.0}, step=1)
    log.log_metrics({"a": 4.0}, step=2)
    assert rows(tmp_path) == [
        {"step": "0", "a": "1.5"},
        {"step": "1", "a": "3.0", "b": "2.0"},
        {"step": "2", "a": "4.0"},
    ]


def test_a_resumed_run_keeps_its_rows_and_replaces_those_it_repeats(tmp_path):
    killed = MetricsCSV(str(tmp_path))
    killed.begin(resumed=False)
    for step in range(5):
        killed.log_metrics({"a": float(step), "b": 0.0}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,5.")
    resumed = MetricsCSV(str(tmp_path))
    resumed.begin(resumed=True)
    for step in (3, 4, 5):
        resumed.log_metrics({"a": step + 0.5}, step)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [
        ("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "3.5"), ("4", "4.5"), ("5", "5.5"),
    ]  # fmt: skip
    assert rows(tmp_path)[0]["b"] == "0.0"


def test_a_fresh_run_moves_an_earlier_file_aside(tmp_path):
    first = MetricsCSV(str(tmp_path))
    first.begin(resumed=False)
    first.log_metrics({"a": 1.0}, 0)
    second = MetricsCSV(str(tmp_path))
    second.begin(resumed=False)
    second.log_metrics({"a": 2.0}, 0)
    assert rows(tmp_path) == [{"step": "0", "a": "2.0"}]
    assert rows(tmp_path, "metrics.1.csv") == [{"step": "0", "a": "1.0"}]


def test_a_test_alone_appends(tmp_path):
    MetricsCSV(str(tmp_path)).log_metrics({"a": 1.0}, 7)
    MetricsCSV(str(tmp_path)).log_metrics({"test/a": 2.0}, 0)
    assert rows(tmp_path) == [{"step": "7", "a": "1.0"}, {"step": "0", "test/a": "2.0"}]


def test_a_resumed_run_keeps_the_validation_of_the_step_it_goes_on_from(tmp_path):
    killed = MetricsCSV(str(tmp_path))
    killed.begin(resumed=False)
    for step in range(4):
        killed.log_metrics({"train/a": float(step)}, step)
        if step % 2:
            killed.log_metrics({"val/a": float(step)}, step + 1)
    resumed = MetricsCSV(str(tmp_path))
    resumed.begin(resumed=True)
    resumed.log_metrics({"train/a": 9.0}, 2)
    resumed.log_metrics({"train/a": 9.5}, 3)
    assert [(row["step"], row.get("train/a"), row.get("val/a")) for row in rows(tmp_path)] == [
        ("0", "0.0", None), ("1", "1.0", None), ("2", None, "1.0"), ("2", "9.0", None), ("3", "9.5", None),
    ]  # fmt: skip


def test_a_validation_that_a_stopped_run_left_replaces_the_one_of_its_step(tmp_path):
    killed = MetricsCSV(str(tmp_path))
    killed.begin(resumed=False)
    killed.log_metrics({"train/a": 1.0}, 1)
    killed.log_metrics({"val/a": 1.0}, 2)
    killed.log_metrics({"train/a": 2.0}, 2)
    resumed = MetricsCSV(str(tmp_path))
    resumed.begin(resumed=True)
    resumed.log_metrics({"val/a": 5.0}, 2)
    resumed.log_metrics({"train/a": 6.0}, 2)
    assert [(row["step"], row.get("train/a"), row.get("val/a")) for row in rows(tmp_path)] == [
        ("1", "1.0", None), ("2", None, "5.0"), ("2", "6.0", None),
    ]  # fmt: skip
