import pytest
import torch
from reward_cases import Scripted, Slices, completion, number_or_status

from frpo.rewards.base import JudgeIdentity
from frpo.rewards.calls import MalformedJudgementsError
from frpo.rewards.compose import Complement, Product, WeightedSum
from frpo.types import Judgement


def part(index):
    """Reads part ``index`` of a text such as "0.5|abstain"."""
    return Scripted(lambda text: number_or_status(text.split("|")[index]))


def summed(text, weights=(1.0, 3.0)):
    rule = WeightedSum({"a": part(0), "b": part(1)}, {"a": weights[0], "b": weights[1]})
    return rule([completion(text)])[0]


def test_the_sum_keeps_its_parts_by_name():
    judgement = summed("0.5|1.0")
    assert judgement.value == 0.5 + 3.0
    assert judgement.components == {"a": 0.5, "b": 1.0}


def test_an_abstaining_part_hands_its_weight_to_the_others():
    judgement = summed("0.5|abstain")
    assert judgement.value == 0.5 * 4.0
    assert judgement.components == {"a": 0.5}
    assert summed("1|abstain").value == summed("1|1").value, "the scale stays"


def test_where_all_abstain_the_sum_abstains():
    judgement = summed("abstain|abstain")
    assert (judgement.status, judgement.reason) == ("abstain", "a: does not apply; b: does not apply")
    assert summed("0.5|abstain", weights=(0.0, 1.0)).status == "abstain", "a part without weight is no reward"


def test_a_failed_part_fails_the_sum_and_is_named():
    judgement = summed("0.5|failed")
    assert (judgement.status, judgement.reason) == ("failed", "b: judge timed out")
    assert judgement.components == {"a": 0.5}
    assert summed("abstain|failed").status == "failed"


def test_rows_do_not_mix():
    rule = WeightedSum({"a": part(0), "b": part(1)}, {"a": 1.0, "b": 1.0})
    judgements = rule([completion(t) for t in ("1|2", "failed|1", "3|abstain")])
    assert [(j.status, j.value) for j in judgements if j.status == "value"] == [("value", 3.0), ("value", 6.0)]
    assert [j.status for j in judgements] == ["value", "failed", "value"]
    assert len(rule.rewards["a"].batches) == 1, "a part is asked once about the whole batch"


def test_nested_components_are_joined_by_a_slash():
    inner = WeightedSum({"x": part(0), "y": part(1)}, {"x": 1.0, "y": 1.0})
    outer = Product({"inner": inner, "gate": part(2)})
    judgement = outer([completion("1|2|0.5")])[0]
    assert judgement.value == 1.5
    assert judgement.components == {"inner": 3.0, "inner/x": 1.0, "inner/y": 2.0, "gate": 0.5}
    assert outer([completion("1|failed|0.5")])[0].reason == "inner: y: judge timed out"


def test_a_product_gates_and_leaves_out_what_abstains():
    rule = Product({"a": part(0), "b": part(1)})
    values = [j.value for j in rule([completion("0.5|0.4"), completion("0|9"), completion("0.5|abstain")])]
    assert values == [0.2, 0.0, 0.5]
    assert rule([completion("abstain|abstain")])[0].status == "abstain"


def test_numbers_too_large_to_combine_are_a_failure():
    rule = Product({"a": Scripted(lambda _: 1e200), "b": Scripted(lambda _: 1e200)})
    assert rule([completion("")])[0].status == "failed"


def test_parts_may_return_bare_numbers_and_nan_fails():
    rule = WeightedSum({"a": Scripted(float)}, {"a": 2.0})
    good, bad = rule([completion("0.25"), completion("nan")])
    assert good == Judgement.of(0.5, {"a": 0.25})
    assert (bad.status, bad.reason) == ("failed", "a: Scripted returned nan")


def test_a_part_with_the_wrong_number_of_judgements_is_refused():
    with pytest.raises(MalformedJudgementsError, match="Slices returned 1 judgements for 2 completions"):
        WeightedSum({"a": Slices(1)}, {"a": 1.0})([completion(""), completion("")])


def test_setup_and_tasks_reach_every_part():
    a, b = part(0), part(1)
    rule = Product({"a": a, "sum": WeightedSum({"b": b}, {"b": 1.0})})
    rule.setup(torch.device("cpu"))
    rule.check_tasks({"t"})
    assert a.devices == b.devices == [torch.device("cpu")]
    assert a.tasks == b.tasks == [{"t"}]


def test_the_complement_turns_values_round_and_keeps_the_rest():
    rule = Complement(WeightedSum({"a": part(0), "b": part(1)}, {"a": 0.5, "b": 0.5}))
    value, failed, abstained = rule([completion(t) for t in ("0.5|0.25", "0.5|failed", "abstain|abstain")])
    assert value == Judgement.of(0.625, {"a": 0.5, "b": 0.25})
    assert (failed.status, failed.reason, failed.components) == ("failed", "b: judge timed out", {"a": 0.5})
    assert abstained.status == "abstain"
    assert Complement(Scripted(float))([completion("0.25")])[0].value == 0.75, "bare numbers count"


def test_the_complement_asks_its_reward_about_devices_and_tasks():
    inner = part(0)
    rule = Complement(inner)
    rule.setup(torch.device("cpu"))
    rule.check_tasks({"t"})
    assert (inner.devices, inner.tasks) == ([torch.device("cpu")], [{"t"}])


class Judged(Scripted):
    """Has a revision and a template."""

    def identity(self):
        return JudgeIdentity("judge", "2", "abcd")


def test_a_composition_is_identified_by_its_parts():
    plain, judged = part(0), Judged(float)
    rule = Complement(WeightedSum({"a": judged, "b": plain}, {"a": 0.5, "b": 0.5}))
    assert rule.identity() == JudgeIdentity(
        "Complement(of=WeightedSum(a=judge, b=reward_cases.Scripted))", revision="2", template_hash="abcd"
    )
    assert Product({"b": plain}).identity() == JudgeIdentity("Product(b=reward_cases.Scripted)")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"got none for \['bee'\].*write `bee: 1.0`"),
        ({"a": 1.0, "be": 1.0, "bee": 1.0}, r"weight for 'be', which is no reward here.*did you mean bee\?"),
        ({"a": 1.0, "bee": -1.0}, "bee: got -1.0, expected at least 0.*negative values instead"),
        ({"a": 1.0, "bee": float("nan")}, "bee: got nan"),
        ({"a": 0.0, "bee": 0.0}, "got 0 for every reward"),
    ],
)
def test_bad_weights_say_what_to_write(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum({"a": part(0), "bee": part(0)}, weights)


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match=r"Product.rewards: got {}, expected at least one"):
        Product({})
    with pytest.raises(ValueError, match="got the name 'a/b'"):
        Product({"a/b": part(0)})
