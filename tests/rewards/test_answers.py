import json

import pytest
from bounds import cpu_below
from reward_cases import completion

from frpo.rewards.answers import Boxed, ExactAnswer, Hashes, LastNumber, Pattern, same_answer


@pytest.mark.parametrize(
    ("extract", "text", "expected"),
    [
        (Boxed(), r"so \boxed{4}", "4"),
        (Boxed(), r"first \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (Boxed(), r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (Boxed(), r"\boxed {5}", "5"),
        (Boxed(), r"f(x) = { x, so \boxed{5} or \boxed{6", "5"),
        (Boxed(), r"\boxed{\boxed{7}}", "7"),
        (Boxed(), r"} \boxed{", None),
        (Boxed(), "no box {5}", None),
        (Hashes(), "work 3+4\n#### 7", "7"),
        (Hashes(), "#### 1,234.50 dollars", "1,234.50"),
        (Hashes(), "#### $-18\n#### -5", "-5"),
        (Hashes(), "#### Step two\nthen 7", None),
        (LastNumber(), "3 apples and 1,200 pears.", "1,200"),
        (LastNumber(), "from 10-5", "5"),
        (LastNumber(), "about −2.5", "−2.5"),
        (LastNumber(), "a fraction: 3/4.", "3/4"),
        (LastNumber(), "x2 and v1.5", None),
        (Pattern(r"(?i)answer is (\w+)"), "The answer is a. No, the ANSWER IS b", "b"),
        (Pattern(r"[A-D]$"), "it is C", "C"),
        (Pattern(r"(z)"), "it is C", None),
    ],
)
def test_extractors(extract, text, expected):
    assert extract(text) == expected


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,000", "1000.0"),
        ("1 000 000", "1000000"),
        ("10{,}000", "10000"),
        (r"10,\!080", "10080"),
        (" 42. ", "42"),
        ("$18", r"\$18.00"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\dfrac12", "-1/2"),
        ("−3", "-3"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\tfrac{\pi}{2})"),
        ("p - q", "p-q"),
    ],
)
def test_same_answers(left, right):
    assert same_answer(left, right)
    assert same_answer(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1", "2"),
        ("1,2", "12"),
        ("1 1/2", "11/2"),
        (r"1\frac{1}{2}", "11/2"),
        (r"\frac{a+b}{c}", "a+b/c"),
        ("3/0", "3"),
        ("1e2", "100"),
        ("0.33", "1/3"),
        ("", "0"),
        ("1.000.000", "1"),
    ],
)
def test_different_answers(left, right):
    assert not same_answer(left, right)
    assert not same_answer(right, left)


@pytest.mark.parametrize(
    "answer", ["9" * 50_000, "1e999999999", "., " * 30_000 + "x", "5 " * 50_000, "\\text{" * 9_000]
)
def test_odd_answers_take_no_time(answer):
    with cpu_below(2.0):
        assert not same_answer(answer, "5")
        for extract in (Boxed(), Hashes(), LastNumber()):
            extract(answer + "\\boxed{" * 9_000)


def judge(rule, text, **fields):
    return rule([completion(text, **fields)])[0]


def test_exact_answer_scores():
    rule = ExactAnswer(correct=1.0, wrong=0.1, missing=-0.5)
    assert judge(rule, r"1 + 1 = 3? \boxed{2}", answer="2").value == 1.0
    assert judge(rule, "#### 3", answer=2).value == 0.1
    assert judge(rule, "no idea", answer=2.0).value == -0.5
    assert judge(rule, "it makes 2.", answer="She has 3.\n#### 2").value == 1.0
    assert judge(rule, "it makes 2.", answer=r"so \boxed{2}").value == 1.0
    assert judge(rule, "it makes 0.", answer=0).value == 1.0


def test_the_first_extractor_that_finds_something_decides():
    assert judge(ExactAnswer(), r"\boxed{1} #### 2 and 3", answer=1).value == 1.0
    assert judge(ExactAnswer(extract=[Hashes(), Boxed()]), r"\boxed{1} #### 2", answer=1).value == 0.0
    assert judge(ExactAnswer(extract=[Hashes()]), r"\boxed{1}", answer=1).value == 0.0


@pytest.mark.parametrize("fields", [{}, {"answer": None}, {"answer": " "}, {"solution": "2"}])
def test_a_row_without_answer_abstains(fields):
    judgement = judge(ExactAnswer(), "2", **fields)
    assert (judgement.status, judgement.reason) == ("abstain", "the row has no 'answer'")


def test_another_field():
    assert judge(ExactAnswer(field="solution"), "2", solution="2").value == 1.0


def test_a_pattern_without_end_is_a_failed_judgement():
    rule = ExactAnswer(extract=[Pattern(r"(a|aa)+$", timeout=0.05)])
    assert judge(rule, "a" * 5000 + "!", answer="a").status == "failed"


def test_no_extractors_are_refused():
    with pytest.raises(ValueError, match=r"extract: got \[\], expected at least one; leave it out"):
        ExactAnswer(extract=[])


def test_gsm8k_and_math500_answers_are_read(shared_data):
    gsm8k, math500 = shared_data / "gsm8k" / "test.jsonl", shared_data / "math500" / "math500_prompts_answers.jsonl"
    if not (gsm8k.is_file() and math500.is_file()):
        pytest.skip("GSM8K or MATH500 not found")
    rule = ExactAnswer()
    rows = [json.loads(line)["answer"] for line in gsm8k.open()]
    judgements = rule([completion(f"so it is {row.split('####')[1]}.", answer=row) for row in rows])
    assert all(j.value == 1.0 for j in judgements)
    rows = [json.loads(line)["answer"] for line in math500.open()]
    right = rule([completion(rf"{{ \boxed{{ {row}. }} $", answer=row) for row in rows])
    wrong = rule([completion(rf"\boxed{{{row} + 1}}", answer=row) for row in rows])
    assert all(j.value == 1.0 for j in right)
    assert not any(j.value for j in wrong)
