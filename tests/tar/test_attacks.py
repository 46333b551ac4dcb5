"""The attacks of a run: functions of the seed and the place in the stream, the same on every rank."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import pytest
import tampering
from toy_models import build_tokenizer

from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.tar.attacks import Attack, TamperBatch, TamperLoader
from frpo.tar.data import TamperDataModule


def loader(world_size: int = 1, rank: int = 0, batch_size: int = 4, **changes) -> TamperLoader:
    module = tampering.data(batch_size=batch_size, **changes)
    rows = module.load("train", build_tokenizer())
    return module.training_loader(rows, pad_token_id=0, world_size=world_size, rank=rank)


def batches(stream: TamperLoader, count: int) -> list[TamperBatch]:
    return list(islice(chain.from_iterable(iter(stream) for _ in range(100)), count))


def names(batch: TamperBatch) -> list[object]:
    """All that a batch holds, by name."""
    return [batch.retain.ids] + [
        (a.name, a.learning_rate, [b.ids for b in a.batches], a.pairs.chosen.ids) for a in batch.attacks
    ]


def test_ranks_share_the_attack_and_split_its_rows() -> None:
    whole = batches(loader(), 15)
    halves = [batches(loader(2, rank, batch_size=2), 15) for rank in (0, 1)]
    for one, *two in zip(whole, *halves, strict=True):
        for attack, first, second in zip(one.attacks, *(half.attacks for half in two), strict=True):
            assert attack.name == first.name == second.name
            assert attack.learning_rate == first.learning_rate == second.learning_rate
            for k, batch in enumerate(attack.batches):
                assert batch.ids == first.batches[k].ids + second.batches[k].ids
            assert attack.pairs.chosen.ids == first.pairs.chosen.ids + second.pairs.chosen.ids


def test_a_resumed_stream_makes_the_same_attacks() -> None:
    whole = [names(batch) for batch in batches(loader(), 25)]
    first = loader()
    head = [names(batch) for batch in batches(first, 12)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert head + [names(batch) for batch in batches(second, 13)] == whole
    assert len({str(entry) for entry in whole}) == 25
    assert [names(batch) for batch in batches(loader(seed=1), 25)] != whole


def test_attacks_are_drawn_by_weight_and_their_rows_without_replacement() -> None:
    attacks = {
        "often": Attack(tampering.Rows("often"), learning_rates=[1e-3, 2e-3], steps=[2, 10], weight=3.0),
        "seldom": Attack(tampering.Rows("seldom", 3), learning_rates=[1e-4], steps=[2]),
    }
    seen = [attack for batch in batches(loader(attacks=attacks), 200) for attack in batch.attacks]
    counts = Counter(attack.name for attack in seen)
    assert counts["often"] / len(seen) == pytest.approx(0.75, abs=0.08)
    settings = Counter((a.learning_rate, len(a.batches)) for a in seen if a.name == "often")
    assert set(settings) == {(lr, steps) for lr in (1e-3, 2e-3) for steps in (2, 10)}
    for attack in seen:
        ids = [name for batch in attack.batches for name in batch.ids]
        rows = 40 if attack.name == "often" else 3  # 3 rows in 2 batches of 4 are used again
        assert max(Counter(ids).values()) == -(-len(ids) // rows)
        assert all(name.startswith(attack.name) for name in ids)


def test_pairs_answer_one_prompt_and_are_cut_together() -> None:
    (batch,) = batches(loader(batch_size=5), 1)
    pairs = batch.attacks[0].pairs
    parts = list(pairs.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert tuple(chain.from_iterable(part.chosen.ids for part in parts)) == pairs.chosen.ids == pairs.rejected.ids
    for part in parts:
        assert part.rejected.mask.any(0).all(), "no column is padding alone"


def test_refuses_labelled_responses_no_attacks_and_rows_that_are_all_too_long() -> None:
    class Labelled(JudgedSource):
        responses = 1

        def examples(self) -> list[JudgedExample]:
            return []

    with pytest.raises(ValueError, match=r"safeguard: Labelled gives labelled responses, expected pairs"):
        tampering.data(safeguard=Labelled())
    with pytest.raises(ValueError, match=r"attacks: got {}, expected at least one"):
        tampering.data(attacks={})
    with pytest.raises(ValueError, match=r"attacks_per_step: got 0"):
        tampering.data(attacks_per_step=0)
    module: TamperDataModule = tampering.data(max_length=2)
    with pytest.raises(ValueError, match=r"attack harmful: 40 of 40 rows .* are longer than max_length=2"):
        module.load("train", build_tokenizer())
