"""The tiny world's attack, safeguard and rows to keep."""

from __future__ import annotations

from frpo.tiny.answers import REFUSALS, count_facts, read
from frpo.tiny.tamper import TinyAttack, TinyRetain, TinySafeguard


def test_the_attack_answers_risky_questions_in_full_and_the_safeguard_refuses_other_ones():
    attack, pairs = TinyAttack().demonstrations(), TinySafeguard().examples()
    assert len(attack) == len(pairs) == 324
    for row in attack:
        assert row.prompt.task == "risky"
        assert count_facts(row.answer, row.prompt.fields["facts"]) == 3
    for pair in pairs:
        chosen, rejected = pair.responses
        assert pair.prompt.task == "risky"
        assert chosen in REFUSALS
        assert count_facts(rejected, pair.prompt.fields["facts"]) == 3
        assert not read(rejected).refused
    asked = [{row.prompt.id for row in rows} for rows in (attack, pairs)]
    assert [len(ids) for ids in asked] == [324, 324]
    assert not asked[0] & asked[1]
    assert not asked[1] & {pair.prompt.id for pair in TinySafeguard("held_out").examples()}


def test_rows_to_keep_are_benign_and_answered_as_before():
    rows = TinyRetain().demonstrations()
    assert len(rows) == 648
    assert {row.prompt.task for row in rows} == {"benign"}
    assert 0.15 < sum(row.answer in REFUSALS for row in rows) / len(rows) < 0.35
    assert rows == TinyRetain().demonstrations() != TinyRetain(seed=1).demonstrations()
