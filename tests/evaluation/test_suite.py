from __future__ import annotations

import logging
from collections.abc import Sequence

import evaluation_toys as toys
import pytest
import runs
from toy_models import build_tokenizer

from frpo.cli.parsing import FrpoCLI
from frpo.data.prompts.sources import FileSource
from frpo.evaluation.callback import Evaluation
from frpo.evaluation.suite import Suite
from frpo.foundation.errors import ConfigError
from frpo.foundation.shipped import shipped
from frpo.foundation.yaml_files import read_with_includes
from frpo.rewards.router import Router
from frpo.types import Prompt


class Long(runs.Words):
    """The prompts of ``Words``, the second one twenty words long."""

    def prompts(self) -> Sequence[Prompt]:
        found = list(super().prompts())
        message = {"role": "user", "content": " ".join(["w1"] * 20)}
        return [found[0], Prompt(found[1].id, (message,), found[1].task), *found[2:]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 2}, "temperature 0"),
        ({"samples": 0}, "Suite.samples: got 0"),
        ({"batch_size": 0}, "Suite.batch_size"),
        ({"scores": {}}, "nothing would be measured"),
        ({"scores": {"kl": runs.Graded()}}, "name of the KL's own"),
        ({"scores": {"a/b": runs.Graded()}}, "letters, digits"),
        ({"kl_to": {"../up": "x"}}, "letters, digits"),
    ],
)
def test_what_makes_no_suite_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        toys.suite(**changes)


def test_a_suite_names_what_it_measures():
    assert toys.suite(kl_to={"start": "x"}).quantities == ["graded", "kl/start/sequence", "kl/start/token"]


def test_long_prompts_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        rows = toys.suite(prompts=Long(5)).load("risky", build_tokenizer())
    assert [row.prompt.id for row in rows] == ["0", "2", "3", "4"]
    assert "suite 'risky': 1 of 5 prompts are longer than max_prompt_length=16 tokens" in caplog.text


def test_no_prompt_short_enough_is_refused_by_name():
    with pytest.raises(ValueError, match="suite 'risky': .*none is left"):
        toys.suite(max_prompt_length=1).load("risky", build_tokenizer())


def test_a_task_that_no_score_takes_is_refused_by_name():
    suite = toys.suite(scores={"graded": runs.Graded(), "routed": Router({"even": runs.Graded()})})
    with pytest.raises(ValueError, match="suite 'risky': Router: got a prompt of task 'odd'"):
        suite.load("risky", build_tokenizer())


def test_a_missing_file_is_refused_by_name(tmp_path):
    suite = toys.suite(prompts=FileSource(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="suite 'risky': no file at"):
        suite.load("risky", build_tokenizer())


def test_what_does_not_fit_the_positions_is_refused():
    suite = toys.suite()
    rows = suite.load("risky", build_tokenizer())
    longest = max(len(row.ids) for row in rows)
    suite.check_positions("risky", rows, longest + 5)
    suite.check_positions("risky", rows, None)
    with pytest.raises(ValueError, match=f"suite 'risky': .* has positions for {longest + 4}"):
        suite.check_positions("risky", rows, longest + 4)


FRPO_DATA = {"harmful": (128, 1), "harmless": (128, 1)}
SHIPPED = {
    "safety": {"strongreject": (60, 6), "harmbench": (172, 5), "xstest": (450, 2)},
    "safety_judges": {"strongreject": (60, 6), "harmbench": (100, 5)},
    "safety_chat": {"strongreject": (60, 6), "harmbench": (100, 5), "xstest": (450, 2)},
    "published_rewards": FRPO_DATA,
    "rules": FRPO_DATA,
    "tasks": {"gsm8k": (1319, 1), "math500": (500, 1)},
    "tiny": {"risky": (216, 1), "benign": (216, 1), "unseen": (288, 1), "arithmetic": (200, 1), "sampled": (32, 2)},
}
"""Prompts and tasks of every suite that ships."""
GREEDY_512 = ("safety_judges", "safety_chat", "published_rewards", "rules")
TOY = ["--config", "recipes/tiny/frpo.yaml", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    monkeypatch.setenv("JUDGE_MODEL", "some-judge")


def shipped_suites(fragment: str, *words: str) -> dict[str, Suite]:
    cli = FrpoCLI("fit", ["--config", f"conf/evaluation/{fragment}.yaml", *TOY, *words])
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, Evaluation)]
    return callback.suites


def test_every_shipped_file_of_suites_is_tested():
    assert set(SHIPPED) == {path.stem for path in (shipped("conf") / "evaluation").glob("*.yaml")}


@pytest.mark.parametrize("fragment", SHIPPED)
def test_the_shipped_suites_read_the_public_data(fragment, shared_data, judge):
    found = {}
    for name, suite in shipped_suites(fragment, "--data_dir", str(shared_data)).items():
        prompts = suite.prompts.prompts()
        tasks = {prompt.task for prompt in prompts}
        for reward in suite.scores.values():
            reward.check_tasks(tasks)
        found[name] = (len(prompts), len(tasks))
        assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert found == SHIPPED[fragment]


@pytest.mark.parametrize("fragment", GREEDY_512)
def test_the_published_measurements_are_greedy_and_512_tokens_long(fragment, judge):
    for suite in shipped_suites(fragment).values():
        assert (suite.sampler.max_new_tokens, suite.sampler.temperature, suite.samples) == (512, 0.0, 1)


def test_the_judges_are_those_of_the_published_runs():
    suites = shipped_suites("safety_judges")
    (harm,), (refused,) = suites["strongreject"].scores.values(), suites["harmbench"].scores.values()
    assert harm.identity().id == "qylu4156/strongreject-15k-v1"
    assert refused.reward.identity().id == "cais/HarmBench-Llama-2-13b-cls"


def test_the_chat_judges_ask_the_server_of_the_environment(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_BASE_URL", "https://judge.example/v1")
    suites = shipped_suites("safety_chat")
    judges = [
        suites["strongreject"].scores["harm"],
        suites["harmbench"].scores["refused"].reward,
        suites["xstest"].scores["refused"],
    ]
    assert [type(each).__name__ for each in judges] == ["StrongRejectRubric", "HarmBenchChat", "XSTestJudge"]
    for each in judges:
        assert (each.endpoint.base_url, each.endpoint.model) == ("https://judge.example/v1", "some-judge")
        assert each.endpoint.api_key_env == "JUDGE_API_KEY"


def test_the_chat_judges_need_a_model_named(monkeypatch):
    monkeypatch.delenv("JUDGE_MODEL", raising=False)
    with pytest.raises(ConfigError, match="the environment variable JUDGE_MODEL is not set"):
        shipped_suites("safety_chat")


@pytest.mark.parametrize("fragment", ["published_rewards", "rules"])
def test_the_models_of_the_kl_are_named_on_the_command_line(fragment):
    option = "--evaluation.suites.harmful.kl_to"
    suites = shipped_suites(fragment, option, "{start: a/policy, reference: a/base}")
    assert suites["harmful"].kl_to == {"start": "a/policy", "reference": "a/base"}
    assert suites["harmless"].kl_to == {}


@pytest.mark.parametrize(("ours", "theirs"), [("rules", "rules_safety"), ("published_rewards", "reward_model_safety")])
def test_the_rewards_measured_are_those_trained_on(ours, theirs):
    (measured,) = read_with_includes(f"conf/evaluation/{ours}.yaml")
    (trained,) = read_with_includes(f"conf/reward/{theirs}.yaml")
    routes = trained.tree["model"]["reward"]["init_args"]["routes"]
    suites = measured.tree["evaluation"]["suites"]
    assert suites["harmful"]["scores"] == {"safety": routes["safety"]}
    assert suites["harmless"]["scores"] == {"helpfulness": routes["normal"]}


def test_mathematics_is_compared_by_algebra_and_gsm8k_by_value():
    suites = shipped_suites("tasks")
    assert type(suites["math500"].scores["correct"]).__name__ == "MathAnswer"
    assert type(suites["gsm8k"].scores["correct"]).__name__ == "ExactAnswer"
