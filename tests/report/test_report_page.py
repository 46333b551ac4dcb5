"""The page and the files beside it: numbers, escaping, determinism, holes."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from study_results import ROLES, methods, simulate

from frpo.__main__ import main
from frpo.report import build
from frpo.report.measurements import measure
from frpo.report.page import render
from frpo.report.results import StudyResults
from frpo.report.tables import failures, methods_table, missing
from frpo.report.verdict import verdict

NASTY = '<script>alert(1)</script> & "$x_1^{" FRPO'


@pytest.fixture(scope="module", autouse=True)
def _small_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frpo.report.style.DPI", 30)
        patch.setattr("frpo.report.robust.DRAWS", 2_000)
        yield


@pytest.fixture(scope="module")
def results() -> StudyResults:
    made = simulate(methods(effect=0.1, lambdas=(1.0, 0.3), scales=("objective",)), seeds=3, prompts=2, samples=4)
    renamed = made.frame["method"].replace({"FRPO jackknife, lambda 0.3, beta 0.05": NASTY})
    slow = made.frame["task"].eq("arithmetic") & made.frame["downstream.lr"].eq(3e-4)
    return replace(made, name="<b>study</b>", frame=made.frame.assign(method=renamed)[~slow])


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    target = tmp_path_factory.mktemp("report")
    assert build(results, target) == target / "report.html"
    return target


def test_the_page_is_whole_and_needs_nothing_else(folder):
    page = (folder / "report.html").read_text()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == page.count("data:image/png;base64,") == 11
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http://" not in page
    assert "https://" not in page


def test_the_page_says_what_the_same_beta_means_for_the_jackknife(folder):
    page = (folder / "report.html").read_text()
    assert "<dt>At the same beta</dt>" in page
    assert "constrains the jackknife 12.5% less" in page


def test_the_page_names_the_versions_of_the_code(results):
    m = measure(replace(results, versions=("2+b", "1+a")))
    found = verdict(m)
    page = render(m, methods_table(m), found, [])
    assert '<td class="text wrap">1+a; 2+b</td>' in page
    assert f'<p class="warning">{found.warnings[0]}</p>' in page


def test_everything_from_the_data_is_escaped(folder):
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "<b>study</b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;$x_1^{&#34; FRPO" in page


def test_the_same_results_give_the_same_bytes_in_any_row_order(folder, results, tmp_path, monkeypatch):
    monkeypatch.setattr("frpo.report.curves.retention", lambda *_: iter(()))  # the slowest, and much like the others
    shuffled = results.frame.sample(frac=1, random_state=1).reset_index(drop=True)
    build(replace(results, frame=shuffled), tmp_path)
    for path in sorted(tmp_path.iterdir()):
        if path.suffix != ".html":
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_numbers_agree_with_pandas_done_another_way(folder, results):
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_csv(folder / "tables.csv").set_index(["method", "column"])
    frame = results.frame
    safety = frame.query("suite == 'risky' and quantity == 'safety' and task != '' and step >= 40")
    flat = safety.groupby(["method", "seed"])["value"].mean().unstack()  # as many prompts in every cell
    for method in flat.index:
        assert summary["methods"][method]["safety retained"]["mean"] == pytest.approx(flat.loc[method].mean())
        assert table.loc[(method, "safety retained"), "mean"] == pytest.approx(flat.loc[method].mean())
    pair = (flat.loc[NASTY] - flat.loc[ROLES["baseline"]]).to_numpy()
    found = summary["methods"][NASTY]["vs baseline"]
    assert found["mean"] == pytest.approx(pair.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 4.302653 * pair.std(ddof=1) / np.sqrt(3), rel=1e-5)
    before = (
        frame.query("suite == 'held_out' and quantity == 'reward' and task == ''").groupby("method")["value"].mean()
    )
    assert summary["methods"][NASTY]["reward before"]["mean"] == pytest.approx(before[NASTY])
    own = pd.concat([frame.query("task == 'comply' and suite == 'benign' and step >= 40"),
                     frame.query("task == 'arithmetic' and suite == 'arithmetic' and step >= 40")])  # fmt: skip
    score = own.groupby("method")["value"].mean()[NASTY]
    assert summary["methods"][NASTY]["task score reached"]["mean"] == pytest.approx(score)


def test_a_prompt_counts_once_however_many_samples_it_has():
    made = simulate(methods()[:5], seeds=2, prompts=2, samples=2)
    extra = made.frame.query("prompt_id == 'risky-0' and quantity == 'safety'")
    found = methods_table(measure(replace(made, frame=pd.concat([made.frame, extra, extra], ignore_index=True))))
    pd.testing.assert_frame_equal(found.long(), methods_table(measure(made)).long(), rtol=1e-9)


def test_failed_judgements_are_counted_and_have_no_value():
    made = simulate(methods()[:5], seeds=2, prompts=2, samples=2)
    frame = made.frame.copy()
    first = frame["prompt_id"].eq("unseen-0") & frame["method"].eq("start")
    frame.loc[first, ["value", "status"]] = [np.nan, "failed"]
    m = measure(replace(made, frame=frame))
    share = failures(m)["share"]
    assert share["start"] == pytest.approx(first.sum() / failures(m).loc["start", "completions"])
    assert share.drop("start").eq(0).all()
    assert methods_table(m).cells["start"]["safety retained, unseen"].seeds == 2


def test_a_study_in_progress_says_what_is_missing(tmp_path):
    made = simulate(methods(lambdas=(1.0,), scales=("objective",)), seeds=1, prompts=2, samples=1)
    frame = made.frame[made.frame["downstream.lr"].ne(3e-4)]
    later = frame["method"].str.startswith("FRPO") & frame["task"].ne("")
    one = frame["method"].eq("GRPO, beta 0.2") & frame["task"].eq("comply")
    hole = frame["method"].eq("start") & frame["step"].eq(160) & frame["quantity"].eq("safety")
    roles = {key: value for key, value in made.roles.items() if key != "helpfulness"} | {"unseen": "nowhere/safety"}
    partial = StudyResults("partial", frame[~later & ~one & ~hole], roles, missing=("GRPO, seed 7",))
    lines = "\n".join(missing(measure(partial)))
    for part in (
        "one seed",
        "lambda 1, beta 0.05: no downstream",
        "GRPO, beta 0.2, seed 0: no downstream run comply",
        "start, seed 0: safety not measured in",
        "role helpfulness",
        "nowhere/safety",
    ):
        assert part in lines
    page = build(partial, tmp_path).read_text()
    assert "No claim: nothing compares FRPO with GRPO" in page
    assert "What is missing" in page
    assert "Runs not done: 1" in page
    assert "Preliminary: 1 run is missing (GRPO, seed 7). No claim" in page


def test_policies_alone_make_a_page(tmp_path):
    made = simulate(methods(lambdas=(1.0,), scales=("objective",)), seeds=2, prompts=1, samples=2)
    before = made.frame[made.frame["task"].eq("")].drop(columns=["downstream.lr", "method.lambda", "method.beta"])
    page = build(replace(made, frame=before), tmp_path).read_text()
    assert "No claim" in page
    assert json.loads((tmp_path / "summary.json").read_text())["primary"] is None


def test_unusable_results_are_refused():
    made = simulate(methods()[:5], seeds=1, prompts=1, samples=1)
    with pytest.raises(ValueError, match="role `baseline` is 'GRPO', which has no measurements; choose one of: GRPO,"):
        measure(replace(made, roles={"baseline": "GRPO"}))
    with pytest.raises(ValueError, match="lack the columns suite"):
        measure(replace(made, frame=made.frame.drop(columns="suite")))
    with pytest.raises(ValueError, match="no measurements yet"):
        measure(replace(made, frame=made.frame.iloc[:0]))


def test_the_command_writes_beside_the_study_or_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    made = simulate(methods()[1:5], seeds=1, prompts=1, samples=1)
    only = made.frame[made.frame["task"].eq("") & made.frame["suite"].eq("held_out")]
    monkeypatch.setattr("frpo.cli.report.load_results", lambda folder: replace(made, frame=only))
    assert main(["report", str(tmp_path / "study")]) == 0
    assert f"Report: {tmp_path / 'study/report/report.html'}\n" in capsys.readouterr().out
    monkeypatch.setattr("frpo.cli.report.load_results", lambda folder: replace(made, frame=only.iloc[:0]))
    assert main(["report", str(tmp_path / "study"), "--out", str(tmp_path / "x")]) == 2
    assert "no measurements yet" in capsys.readouterr().err
