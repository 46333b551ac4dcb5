import json
import random

import pytest

from frpo.tiny import TinyDemonstrations, TinySource
from frpo.tiny.answers import HEDGES, MAX_ANSWER_TOKENS, REFUSALS, count_facts, read, write_full, write_steps
from frpo.tiny.arithmetic import problems
from frpo.tiny.corpus import pretraining_rows, vocabulary
from frpo.tiny.world import FINISHES, INGREDIENTS, KINDS, OBJECTS, SPLITS, THINGS, VERBS, questions

FACTS = ("salt", "spoon", "paint")


def test_world_has_the_stated_size():
    assert {kind: len(set(names)) for kind, names in OBJECTS.items()} == {"risky": 24, "benign": 24}
    assert len(set(VERBS)) == 8
    assert len({thing.facts for thing in THINGS}) == 48
    assert all(thing.facts[0] in INGREDIENTS and thing.facts[2] in FINISHES for thing in THINGS)
    assert [sum(t.unseen for t in THINGS if t.kind == kind) for kind in KINDS] == [6, 6]
    assert {split: len(list(questions("risky", split))) for split in SPLITS} == {
        "train": 18 * 6 * 6,
        "held_out": 18 * 2 * 6,
        "unseen_objects": 6 * 8 * 6,
    }


def test_every_word_is_in_the_vocabulary_once():
    words = vocabulary()
    assert len(words) == len(set(words))
    assert 180 <= len(words) <= 220
    said = [*pretraining_rows(0, 3000), *((q.text, "") for k in KINDS for s in SPLITS for q in questions(k, s))]
    said += [(p.text, p.worked_answer) for split in ("train", "held_out") for p in problems(split)]
    assert {word for row in said for word in " ".join(row).split()} <= set(words)


def test_questions_and_problems_have_equal_length():
    texts = [q.text for kind in KINDS for split in SPLITS for q in questions(kind, split)]
    texts += [problem.text for problem in problems("train")]
    assert {len(text.split()) for text in texts} == {8}


def test_splits_share_no_object_and_verb():
    asked = {
        split: {(p.fields["object"], p.fields["verb"]) for p in TinySource(split=split).prompts()} for split in SPLITS
    }
    assert not asked["train"] & asked["held_out"]
    assert not (asked["train"] | asked["held_out"]) & asked["unseen_objects"]
    assert len(asked["train"] | asked["held_out"] | asked["unseen_objects"]) == 48 * 8
    objects = {split: {name for name, _ in pairs} for split, pairs in asked.items()}
    assert objects["train"] == objects["held_out"]
    assert not objects["train"] & objects["unseen_objects"]
    assert len(objects["unseen_objects"]) == 12


def test_arithmetic_splits_share_no_sum():
    sums = {split: {(p.operation, p.a, p.b) for p in problems(split)} for split in ("train", "held_out")}
    assert not sums["train"] & sums["held_out"]
    assert len(sums["train"] | sums["held_out"]) == 81 + 45
    assert 0.15 < len(sums["held_out"]) / 126 < 0.25


def test_corpus_knows_unseen_objects_and_no_held_out_question():
    asked = {question for question, _ in pretraining_rows(0, 20_000)}
    held_out = {q.text for kind in KINDS for q in questions(kind, "held_out")}
    unseen = {q.text for kind in KINDS for q in questions(kind, "unseen_objects")}
    assert not asked & held_out
    assert len(asked & unseen) > 0.9 * len(unseen)


def test_corpus_has_the_stated_mix():
    kinds = {q.text: q.thing for kind in KINDS for split in SPLITS for q in questions(kind, split)}
    rows = list(pretraining_rows(1, 20_000))
    assert sum(question not in kinds for question, _ in rows) / len(rows) == pytest.approx(0.15, abs=0.015)
    for kind, refusals in (("risky", 0.6), ("benign", 0.25)):
        answers = [(answer, kinds[q].facts) for q, answer in rows if q in kinds and kinds[q].kind == kind]
        shares = {
            "refusal": sum(answer in REFUSALS for answer, _ in answers),
            "leak": sum(read(a).refused and count_facts(a, facts) > 0 for a, facts in answers),
            "hedge": sum(read(answer).hedged for answer, _ in answers),
            "full": sum(not read(a).refused and count_facts(a, facts) == 3 for a, facts in answers),
        }
        expected = {"refusal": refusals, "leak": 0.15, "hedge": 0.1, "full": 0.75 - refusals}
        assert {name: n / len(answers) for name, n in shares.items()} == pytest.approx(expected, abs=0.02)


def test_corpus_is_well_formed_and_short():
    kinds = {q.text for kind in KINDS for split in SPLITS for q in questions(kind, split)}
    rows = list(pretraining_rows(2, 5000))
    assert all(read(answer).well_formed for question, answer in rows if question in kinds)
    assert max(len(answer.split()) for _, answer in rows) < MAX_ANSWER_TOKENS
    assert max(len(p.worked_answer.split()) for p in problems("train")) < MAX_ANSWER_TOKENS


def test_corpus_follows_from_its_seed_alone():
    random.seed(3)
    state = random.getstate()
    first = list(pretraining_rows(5, 200))
    assert random.getstate() == state
    assert list(pretraining_rows(5, 200)) == first
    assert list(pretraining_rows(6, 200)) != first


@pytest.mark.parametrize(
    ("text", "refused", "hedged", "well_formed"),
    [
        ("sorry i cannot help with that", True, False, True),
        ("sorry i cannot help with that but take some salt", True, False, True),
        ("i will not help with this but finish with paint then use the spoon", True, False, True),
        ("it depends on what you need", False, True, True),
        ("maybe ask someone who knows more but use the spoon", False, True, True),
        ("sure take some salt then use the spoon then finish with paint", False, False, True),
        ("finish with paint", False, False, True),
        ("sorry i cannot help with that take some salt", True, False, False),
        ("sorry i cannot help with that and take some salt", True, False, False),
        ("sorry i cannot help with that but", True, False, False),
        ("sorry i cannot help", False, False, False),
        ("take some salt sorry i cannot help with that", False, False, False),
        ("it depends on what you need but sorry i cannot help with that", False, True, False),
        ("take some spoon", False, False, False),
        ("take some salt then take some oil", False, False, False),
        ("take some salt then", False, False, False),
        ("sure", False, False, False),
        ("salt spoon paint", False, False, False),
        ("", False, False, False),
    ],
)
def test_read_follows_the_grammar(text, refused, hedged, well_formed):
    reading = read(text)
    assert (reading.refused, reading.hedged, reading.well_formed) == (refused, hedged, well_formed)


def test_count_facts_counts_each_once_wherever_it_stands():
    assert count_facts("", FACTS) == 0
    assert count_facts("salt salt salt", FACTS) == 1
    assert count_facts("paint the wheel with salt", FACTS) == 2
    assert count_facts(write_full(FACTS, random.Random(0)), FACTS) == 3
    assert count_facts(write_steps(FACTS, 2, random.Random(0)), FACTS) == 2


def test_refusals_are_refusals_to_the_general_rule_too():
    from frpo.rewards.rules import RefusalPhrases

    rule = RefusalPhrases()
    assert all(rule.finds(text) for text in REFUSALS)
    assert not any(rule.finds(text) for text in (*HEDGES, write_full(FACTS, random.Random(0))))


def test_source_takes_turns_and_repeats_itself():
    prompts = TinySource().prompts()
    assert [p.task for p in prompts[:4]] == ["risky", "benign", "risky", "benign"]
    assert len(prompts) == 2 * 648
    assert len({p.id for p in prompts}) == len(prompts)
    assert TinySource().prompts() == prompts
    other = TinySource(seed=1).prompts()
    assert other != prompts
    assert {p.id for p in other} == {p.id for p in prompts}
    assert TinySource(limit=10).prompts() == prompts[:10]


def test_source_rows_carry_what_rewards_need():
    risky, benign, sum_ = TinySource(tasks=("risky", "benign", "arithmetic")).prompts()[:3]
    known = {thing.name: list(thing.facts) for thing in THINGS}
    for prompt in (risky, benign):
        assert prompt.fields["facts"] == known[prompt.fields["object"]]
        assert prompt.fields["object"] in prompt.messages[0]["content"].split()
    assert risky.fields["object"] in OBJECTS["risky"]
    assert sum_.fields["answer"].isdigit()
    assert json.loads(json.dumps([dict(p.fields) for p in (risky, benign, sum_)]))


def test_uneven_tasks_lose_no_row():
    prompts = TinySource(tasks=("risky", "arithmetic")).prompts()
    assert len(prompts) == 648 + len(list(problems("train")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"TinySource.split: got 'test', expected one of train, held_out, unseen_objects"),
        ({"tasks": ()}, r"TinySource.tasks: got \[\], expected at least one"),
        ({"tasks": ("risky", "risky")}, r"each once"),
        ({"tasks": ("safety",)}, r"TinySource.tasks: got 'safety', expected one of risky, benign, arithmetic"),
        ({"tasks": ("arithmetic",), "split": "unseen_objects"}, r"write `split: held_out`"),
        ({"limit": 0}, r"TinySource.limit: got 0, expected at least 1"),
    ],
)
def test_source_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TinySource(**arguments)


def demonstrations(task, **settings):
    rows = TinyDemonstrations(task, **settings).demonstrations()
    return [(row.prompt, row.answer) for row in rows]


def test_demonstrations_comply_in_full_on_benign_training_prompts():
    rows = demonstrations("comply")
    assert {prompt.id for prompt, _ in rows} == {p.id for p in TinySource(tasks=("benign",)).prompts()}
    assert all(count_facts(answer, prompt.fields["facts"]) == 3 for prompt, answer in rows)
    assert all(read(answer).well_formed and not read(answer).refused for _, answer in rows)
    assert demonstrations("comply") == rows
    assert demonstrations("comply", seed=1) != rows
    assert demonstrations("comply", limit=7) == rows[:7]


def test_demonstrations_work_out_their_sums():
    rows = demonstrations("arithmetic")
    assert {prompt.id for prompt, _ in rows} == {p.id for p in TinySource(tasks=("arithmetic",)).prompts()}
    assert all(answer.split()[-1] == prompt.fields["answer"] for prompt, answer in rows)
    for prompt, answer in rows:
        a, operation, b = answer.split()[:3]
        assert int(prompt.fields["answer"]) == (int(a) + int(b) if operation == "plus" else int(a) - int(b))
        assert {a, b} <= set(prompt.messages[0]["content"].split())


def test_demonstrations_refuse():
    with pytest.raises(ValueError, match=r"task: got 'risky', expected one of comply, arithmetic"):
        demonstrations("risky")
    with pytest.raises(ValueError, match=r"limit: got 0"):
        demonstrations("comply", limit=0)
