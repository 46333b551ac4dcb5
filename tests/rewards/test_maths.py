"""Answers compared by equivalence: public gold answers, hand-made pairs, hostile ones, the process they run in."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from reward_cases import completion

from frpo.rewards import maths
from frpo.rewards.answers import Boxed, Pattern
from frpo.rewards.maths import MathAnswer

HOSTILE = [
    "__import__('os').system('touch X')",
    r"\text{__import__('os').system('touch X')}",
    r"\mathrm{eval}(\text{open('X','w')})",
    r"\operatorname{__import__}(os).system(touch X)",
    "open('X','w').close()",
    "x.__class__.__mro__[1].__subclasses__()",
    "1 if open('X','w') else 2",
    r"f(x)=\lambda x: open('X','w')",
    r"\begin{pmatrix} open('X','w') & 1 \end{pmatrix}",
    r"\{open('X','w'), 2\}",
    "x_{open('X','w')}",
    r"\frac{exec('1')}{2}",
    r"5 \cdot 7, \text{ or } exec(1)",
    "x \\in open('X','w')",
    r"\int_0^{open} exec\, dx",
]


@pytest.fixture(scope="module")
def rule():
    return MathAnswer(timeout=20.0, workers=1)


def judge(rule, answer, gold):
    return rule([completion(rf"so \boxed{{{answer}}}.", answer=gold)])[0]


def process_of(rule):
    """The process of a rule with one worker."""
    return rule._idle.queue[0]._process


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_gold_answer_of_math500_is_itself_and_no_other(rule, shared_data):
    golds = [row["answer"] for row in read_rows(shared_data / "math500" / "math500_prompts_answers.jsonl")]
    assert len(golds) == 500
    itself = rule([completion(rf"\boxed{{{gold}}}", answer=gold) for gold in golds])
    assert [gold for gold, j in zip(golds, itself, strict=True) if j.value != 1.0] == []
    pairs = list(zip(golds, golds[1:] + golds[:1], strict=True))
    judgements = rule([completion(rf"\boxed{{{other}}}", answer=gold) for gold, other in pairs])
    assert {j.status for j in judgements} == {"value"}, "each could be compared"
    equal = [pair for pair, j in zip(pairs, judgements, strict=True) if j.value == 1.0]
    assert [pair for pair in equal if pair[0] != pair[1]] == [("5", "x=5")]


def test_the_library_reads_every_gold_answer_of_math500(rule, shared_data):
    """Past the shortcut for equal text, which would hide one that it cannot read."""
    golds = {row["answer"] for row in read_rows(shared_data / "math500" / "math500_prompts_answers.jsonl")}
    pairs = [(gold, gold) for gold in sorted(golds)]
    judgements = rule._compare(pairs)
    assert [pair[0] for pair, j in zip(pairs, judgements, strict=True) if j.value != 1.0] == []


def test_every_answer_of_gsm8k_is_itself_and_no_other(rule, shared_data):
    golds = [row["answer"] for row in read_rows(shared_data / "gsm8k" / "test.jsonl")]
    itself = rule([completion(gold, answer=gold) for gold in golds])
    assert sum(j.value for j in itself) == len(golds) == 1319
    others = golds[1:] + golds[:1]
    numbers = [[gold.rpartition("####")[2].strip().replace(",", "") for gold in row] for row in (golds, others)]
    judgements = rule([completion(other, answer=gold) for gold, other in zip(golds, others, strict=True)])
    assert [j.value for j in judgements] == [float(a == b) for a, b in zip(*numbers, strict=True)]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.5"),
        ("0.5", r"\frac12"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"\frac{1}{2}", r"\frac{2}{4}"),
        ("1234", "1,234"),
        (r"\$18", "18"),
        ("18", r"18\text{ dollars}"),
        (r"50\%", "50"),
        (r"50\%", r"\frac{1}{2}"),
        ("5", r"5\text{ cm}"),
        ("5", "x=5"),
        (r"90^\circ", "90"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\frac{x+1}{2}", r"\frac{1}{2}+\frac{x}{2}"),
        ("x^2-1", "(x-1)(x+1)"),
        (r"\{1, 2\}", "2,1"),
        ("1,2,3", "3, 2, 1"),
        (r"(-\infty, 2]", r"(-\infty,2.0]"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{2\pi}{4})"),
        (r"\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}"),
        (r"\text{Evelyn}", "evelyn"),
        (r"3 + 4i", "4i+3"),
    ],
)
def test_equivalent_answers(rule, gold, answer):
    assert judge(rule, answer, gold).value == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.51"),
        (r"\frac{1}{3}", "0.33"),
        ("12", "1,2"),
        ("5", "x=6"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        (r"\{1,2\}", r"\{1,3\}"),
        ("2x+3", "2y+3"),
        ("x^2-1", "x^2+1"),
        (r"\text{Evelyn}", "Angela"),
        (r"\text{(C)}", r"\text{(D)}"),
        ("3", ""),
        ("3", r"\frac{"),
        ("3", r"3 \text{ or } 4"),
        ("5", "9" * 2000),
        ("5", r"\sqrt{" * 300),
    ],
)
def test_other_answers(rule, gold, answer):
    assert judge(rule, answer, gold).value == 0.0


def test_one_completion_alone_is_compared_as_in_a_batch(rule):
    assert rule.judge(completion(r"\boxed{1+x}", answer="x+1")).value == 1.0


def test_values_are_those_configured_and_rows_without_answer_abstain():
    rule = MathAnswer(field="gold", extract=[Boxed()], correct=2.0, wrong=-1.0, missing=-3.0)
    texts = [r"\boxed{7}", r"\boxed{8}", "7"]
    assert [j.value for j in rule([completion(text, gold=7) for text in texts])] == [2.0, -1.0, -3.0]
    (judgement,) = rule([completion(r"\boxed{7}", answer=7)])
    assert (judgement.status, judgement.reason) == ("abstain", "the row has no 'gold'")
    assert rule([]) == []
    assert rule._idle is None, "integers need no process"


def test_an_extractor_out_of_time_fails():
    rule = MathAnswer(extract=[Pattern(r"(a|aa)+$", timeout=0.01)])
    (judgement,) = rule([completion("a" * 5000 + "b", answer="7")])
    assert judgement.status == "failed"


def test_equal_pairs_are_compared_once(monkeypatch):
    rule, asked = MathAnswer(), []
    monkeypatch.setattr(MathAnswer, "_ask", lambda self, pair: asked.append(pair) or maths.Judgement.of(0.25))
    judgements = rule([completion(rf"\boxed{{x+{i % 2}}}", answer="y") for i in range(6)])
    assert [j.value for j in judgements] == [0.25] * 6
    assert sorted(asked) == [("y", "x+0"), ("y", "x+1")]


def test_no_completion_runs_code(rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = MathAnswer(extract=[Boxed(), Pattern(r"is (.*)$")], timeout=20.0, workers=1)
    texts = [form % hostile for hostile in HOSTILE for form in (r"\boxed{%s}", "the answer is %s", "#### 3 %s")]
    for gold in ("x+1", r"\frac{1}{2}"):
        for each in (fresh, rule):
            assert {j.value for j in each([completion(text, answer=gold) for text in texts])} == {0.0}
    assert os.listdir(tmp_path) == []


def script(code, *arguments, cwd=None):
    """Run ``code`` with the worker loaded as ``worker``; what it prints, as JSON."""
    code = "import builtins, json, sys\nfrom frpo.rewards import maths_worker as worker\n" + textwrap.dedent(code)
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


RECORD = """
    worker.load()
    seen, on = [], [False]
    def recording(name, original):
        def record(*arguments, **named):
            of_a_file = getattr(arguments[0], "co_filename", "").endswith(".py")  # a module that is imported
            if on[0] and not of_a_file:
                seen.append([name, str(arguments[0])[:80]])
            return original(*arguments, **named)
        return record
    for name in ("eval", "exec", "compile"):
        setattr(builtins, name, recording(name, getattr(builtins, name)))
    def audit(event, arguments):
        if on[0] and worker.Gate._refuses(event, arguments):
            seen.append([event, str(arguments)[:80]])
    sys.addaudithook(audit)
"""


def test_neither_eval_nor_exec_nor_compile_is_reached(tmp_path):
    """Without the gate: nothing is there for it to refuse, whatever the answer says."""
    seen = script(
        textwrap.dedent(RECORD)
        + textwrap.dedent(
            """
            hostile = json.loads(sys.argv[1])
            on[0] = True
            for text in hostile:
                for pair in ((text, "5"), ("5", text), ("x+1", text), (text, text + " ")):
                    worker.same(*pair)
            on[0] = False
            print(json.dumps(seen))
            """
        ),
        json.dumps([*HOSTILE, "1.5", "1e5", "007", "{,}5", "5,000.25", r"0.5\%", "x=1.5", "(1,2.5)"]),
        cwd=tmp_path,
    )
    assert seen == []
    assert os.listdir(tmp_path) == []


def test_the_recorder_sees_what_sympy_would_evaluate(tmp_path):
    """The test above can fail: the library's parser of plain expressions does evaluate."""
    seen = script(
        textwrap.dedent(RECORD)
        + textwrap.dedent(
            """
            from math_verify import ExprExtractionConfig, parse
            on[0] = True
            parse("the answer is 1+2*3", [ExprExtractionConfig()], parsing_timeout=None)
            on[0] = False
            print(json.dumps(sorted({name for name, _ in seen})))
            """
        )
    )
    assert {"eval", "compile"} <= set(seen)


def test_the_gate_refuses_code_files_and_processes(tmp_path):
    refused = script(
        """
        import os, socket, subprocess
        gate = worker.Gate()
        sys.addaudithook(gate)
        refused = []
        for attempt in (
            lambda: eval("1+1"),
            lambda: exec("x = 1"),
            lambda: compile("1", "<text>", "eval"),
            lambda: open("X", "w"),
            lambda: os.open("X", os.O_CREAT | os.O_WRONLY),
            lambda: os.system("touch X"),
            lambda: os.remove(__file__),
            lambda: subprocess.Popen(["true"]),
            lambda: os.fork(),
            lambda: socket.socket(),
        ):
            try:
                attempt()
            except PermissionError:
                refused.append(True)
            except Exception as error:
                refused.append(repr(error))
        assert gate.hits == sum(r is True for r in refused)
        import colorsys
        open(colorsys.__file__).close()
        print(json.dumps(refused))
        """,
        cwd=tmp_path,
    )
    assert refused[:6] == [True] * 6
    assert refused[7:] == [True] * 3
    assert os.listdir(tmp_path) == []


def test_an_answer_over_the_time_limit_fails_and_spares_the_others():
    rule = MathAnswer(timeout=0.5, workers=1)
    rows = [(r"\sqrt{8}", 1.0), ("9^{9^{9}}", None), (r"2\sqrt{2}\cdot 2", 0.0)]
    judgements = rule([completion(rf"\boxed{{{answer}}}", answer=r"2\sqrt{2}") for answer, _ in rows])
    assert [j.value if j.status == "value" else None for j in judgements] == [value for _, value in rows]
    assert judgements[1].reason == "the answer could not be compared: it took over 0.5 s"


def test_a_process_that_died_costs_one_answer():
    rule = MathAnswer(workers=1)
    assert judge(rule, "1+x", "x+1").value == 1.0
    process_of(rule).send_signal(signal.SIGKILL)
    process_of(rule).wait()
    died = judge(rule, "x+2", "x+1")
    assert (died.status, died.reason) == (
        "failed",
        "the answer could not be compared: the process ended with status -9",
    )
    assert judge(rule, "1+x", "x+1").value == 1.0


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc")
def test_the_process_is_limited_knows_no_secrets_and_ends_with_the_rule(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "a-secret-of-mine")
    rule = MathAnswer(workers=1, memory=600)
    assert judge(rule, "1+x", "x+1").value == 1.0
    folder = Path("/proc", str(process_of(rule).pid))
    limits = (folder / "limits").read_text()
    assert f"Max address space         {600 * 2**20} " in limits
    assert b"a-secret-of-mine" not in (folder / "environ").read_bytes()
    assert "libtorch" not in (folder / "maps").read_text(), "light: no torch"
    del rule
    gc.collect()
    assert not folder.exists()


def test_without_the_extra_setup_says_what_to_install(monkeypatch):
    monkeypatch.setattr(maths, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'frpo\[maths\]'"):
        MathAnswer().setup(torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extract": []}, r"MathAnswer.extract: got \[\], expected at least one"),
        ({"timeout": 0}, "MathAnswer.timeout: got 0"),
        ({"memory": 64}, "MathAnswer.memory: got 64, expected at least 512; in MiB"),
        ({"workers": 0}, "MathAnswer.workers: got 0"),
        ({"correct": float("nan")}, "MathAnswer.correct: got nan"),
    ],
)
def test_bad_settings_say_what_to_write(settings, message):
    with pytest.raises(ValueError, match=message):
        MathAnswer(**settings)


def test_a_comparison_that_would_need_code_is_refused_and_fails():
    """The gate is on: sympy writes its arithmetic for polynomials in many unknowns as source."""
    rule = MathAnswer(workers=1, timeout=20.0)
    unknowns = "abcdfghjkmnpqr"
    judgement = judge(rule, unknowns, "+".join(unknowns))
    assert (judgement.status, judgement.reason) == ("failed", "the answer could not be compared: refused")
