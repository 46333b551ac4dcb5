import pytest
import torch
from reward_cases import Scripted, Slices, completion, number_or_status, share_of_vowels

from frpo.rewards.base import JudgeIdentity
from frpo.rewards.calls import MalformedJudgementsError
from frpo.rewards.function import FunctionReward
from frpo.rewards.model import RewardModel
from frpo.rewards.router import Router


def test_one_call_a_route_and_the_order_comes_back():
    safety, normal = Scripted(lambda t: float(t)), Scripted(lambda t: -float(t))
    rows = [("1", "safety"), ("2", "normal"), ("3", "safety"), ("4", "safety"), ("5", "normal")]
    judgements = Router({"safety": safety, "normal": normal})([completion(t, task=task) for t, task in rows])
    assert [j.value for j in judgements] == [1.0, -2.0, 3.0, 4.0, -5.0]
    assert safety.batches == [["1", "3", "4"]]
    assert normal.batches == [["2", "5"]]


def test_a_route_without_rows_is_not_called():
    idle = Scripted(number_or_status)
    Router({"a": Scripted(number_or_status), "b": idle})([completion("1", task="a")])
    assert idle.batches == []


def test_other_tasks_go_to_the_default_in_one_call():
    default = Scripted(number_or_status)
    router = Router({"a": Scripted(lambda _: 9.0)}, default=default)
    router.check_tasks({"a", "b", "c"})
    judgements = router([completion("1", task="b"), completion("2", task="a"), completion("failed", task="c")])
    assert [j.status for j in judgements] == ["value", "value", "failed"]
    assert default.batches == [["1", "failed"]]
    assert default.tasks == [{"b", "c"}]


def test_an_unknown_task_is_named_with_the_nearest_route():
    router = Router({"safety": Scripted(number_or_status), "normal": Scripted(number_or_status)})
    router.check_tasks({"safety"})
    message = r"task 'saftey', which has no route; did you mean safety\?.*`saftey:`.*`default:`"
    with pytest.raises(ValueError, match=message):
        router.check_tasks({"safety", "saftey"})
    with pytest.raises(ValueError, match="task 'saftey'"):
        router([completion("1", task="saftey")])
    with pytest.raises(ValueError, match=r"task 'maths', .*; valid here: normal, safety; otherwise .* `maths:`"):
        router.check_tasks({"maths"})


def test_a_nested_router_hears_of_its_own_tasks_only():
    inner = Router({"a": Scripted(number_or_status)})
    Router({"a": inner, "b": Scripted(number_or_status)}).check_tasks({"a", "b"})
    with pytest.raises(ValueError, match="task 'b'"):
        Router({"b": inner}).check_tasks({"b"})
    with pytest.raises(ValueError, match="task 'c'"):
        Router({"b": Scripted(number_or_status)}, default=inner).check_tasks({"b", "c"})


def test_it_is_identified_by_its_routes():
    a, rest = Scripted(number_or_status), FunctionReward(share_of_vowels)
    assert Router({"a": a}, default=rest).identity() == JudgeIdentity(
        "Router(a=reward_cases.Scripted, *=reward_cases:share_of_vowels)"
    )
    assert Router({"a": RewardModel("some/model", revision="2")}).identity() == JudgeIdentity(
        "Router(a=some/model)", revision="2"
    )


def test_setup_reaches_every_route():
    a, default = Scripted(number_or_status), Scripted(number_or_status)
    Router({"a": a}, default=default).setup(torch.device("cpu"))
    assert a.devices == default.devices == [torch.device("cpu")]


def test_a_route_with_the_wrong_number_of_judgements_is_refused():
    with pytest.raises(MalformedJudgementsError, match="Slices returned 3 judgements for 1 completions"):
        Router({"a": Slices(3)})([completion("1", task="a")])


def test_no_routes_are_refused():
    with pytest.raises(ValueError, match=r"Router\.routes: got {}, expected at least one"):
        Router({})
    with pytest.raises(ValueError, match=r"Router\.routes: got `\*`, which is no task.*`default:`"):
        Router({"*": Scripted(number_or_status)})
