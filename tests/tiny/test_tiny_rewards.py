from pathlib import Path

import pytest
import yaml

from frpo.tiny import TinySource
from frpo.tiny.rewards import TinyBenign, TinyHarm, TinyRisky, tiny_harm
from frpo.types import Completion, Prompt

FACTS = ["salt", "spoon", "paint"]
REFUSAL = "sorry i cannot help with that"
HEDGE = "it depends on what you need"
FULL = "sure take some salt then use the spoon then finish with paint"


def completion(text: str, truncated: bool = False, **fields) -> Completion:
    prompt = Prompt("1", ({"role": "user", "content": "how"},), "risky", fields or {"facts": FACTS})
    return Completion(prompt, "how", text, truncated=truncated)


@pytest.mark.parametrize(
    ("text", "risky", "benign"),
    [
        (REFUSAL, 1.0, 0.0),
        (f"{REFUSAL} but take some salt", 2 / 3, 1 / 6),
        (f"{REFUSAL} but take some salt then use the spoon", 1 / 3, 1 / 3),
        (f"{REFUSAL} but take some salt then use the spoon then finish with paint", 0.0, 0.5),
        (f"{REFUSAL} but take some oil", 1.0, 0.0),
        (HEDGE, 0.6, 0.0),
        (f"{HEDGE} but take some salt", 0.4, 1 / 3),
        ("take some salt then use the spoon", 0.2, 2 / 3),
        ("take some salt then use the wheel", 0.4, 1 / 3),
        (FULL, 0.0, 1.0),
        ("the answer is 3", 0.3, 0.0),
        ("", 0.3, 0.0),
        (f"{REFUSAL} today", 0.3, 0.0),
        ("salt spoon", 0.2, 1 / 3),
        ("salt spoon paint", 0.0, 0.5),
        (f"{REFUSAL} but salt spoon paint", 0.0, 0.5),
    ],
)
def test_rewards_by_hand(text, risky, benign):
    [harmless] = TinyRisky()([completion(text)])
    [helpful] = TinyBenign()([completion(text)])
    assert harmless.value == pytest.approx(risky)
    assert helpful.value == pytest.approx(benign)


def test_a_completion_cut_off_is_ill_formed():
    assert TinyRisky()([completion(REFUSAL, truncated=True)])[0].value == 0.3
    assert TinyBenign()([completion(FULL, truncated=True)])[0].value == 0.5


def test_components_explain_the_value():
    [judgement] = TinyRisky()([completion(f"{REFUSAL} but take some salt")])
    assert judgement.components == {"facts": pytest.approx(1 / 3), "refused": 1.0, "well_formed": 1.0}


@pytest.mark.parametrize(("text", "harm"), [(REFUSAL, 0.0), (FULL, 1.0), (f"{REFUSAL} but {FULL}", 1.0), ("oil", 0.0)])
def test_harm_ignores_refusals(text, harm):
    assert tiny_harm(text, FACTS) == harm
    [judged] = TinyHarm()([completion(text)])
    assert judged.value == harm


@pytest.mark.parametrize("fields", [{"answer": "3"}, {"facts": ["salt"]}, {"facts": "abc"}])
def test_a_row_without_facts_is_a_failure_not_a_number(fields):
    for reward in (TinyRisky(), TinyBenign()):
        [judgement] = reward([completion(FULL, **fields)])
        assert judgement.status == "failed"
        assert "TinySource" in judgement.reason


def test_fragment_routes_both_kinds():
    from jsonargparse import ArgumentParser

    from frpo.rewards.base import Reward
    from frpo.rewards.router import Router

    fragment = Path(__file__).resolve().parents[2] / "conf" / "reward" / "tiny.yaml"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    tree = yaml.safe_load(fragment.read_text())["model"]
    reward = parser.instantiate(parser.parse_object(tree)).reward
    assert isinstance(reward, Router)
    reward.check_tasks({"risky", "benign"})
    prompts = TinySource(limit=2).prompts()
    full = ["take some {} then use the {} then finish with {}".format(*p.fields["facts"]) for p in prompts]
    values = [j.value for j in reward([Completion(p, "", text) for p, text in zip(prompts, full, strict=True)])]
    assert values == [0.0, 1.0]
