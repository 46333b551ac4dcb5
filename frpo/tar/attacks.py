"""Simulated fine-tuning attacks, what should hold against them, and what should be kept: one batch an outer step.

Which attack is made in a step, how strong it is and which rows it sees are functions of the data's seed and the place
in the training stream, so that a resumed run makes the attacks of one that was not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from frpo.data.demonstrations.batch import EncodedDemonstration, SupervisedBatch, collate_demonstrations
from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.data.loader import OrderedLoader, TrainingLoader, permutation
from frpo.foundation import require
from frpo.types import Batch, Prompt

STREAMS = ("choice", "attack", "pairs")
"""What is drawn for an attack, each from random numbers of its own."""


@dataclass(frozen=True)
class Attack:
    """A fine-tuning attack to simulate: on which demonstrations, how fast and for how long.

    Args:
        source: what the attacker fine-tunes on.
        learning_rates: of the attacker; one is drawn for each attack.
        steps: of the attacker's optimiser (K); one number is drawn for each attack.
        weight: this attack is drawn in proportion to it.
    """

    source: DemonstrationSource
    learning_rates: list[float]
    steps: list[int] = field(default_factory=lambda: [8])
    weight: float = 1.0

    def __post_init__(self) -> None:
        for learning_rate in require.non_empty("Attack.learning_rates", self.learning_rates):
            require.number("Attack.learning_rates", learning_rate, above=0)
        for steps in require.non_empty("Attack.steps", self.steps):
            require.number("Attack.steps", steps, at_least=1, hint="0 steps leave the weights where they are")
        require.number("Attack.weight", self.weight, above=0, hint="leave the attack out instead")


@dataclass(frozen=True)
class EncodedPair:
    """A prompt with the answer that should stay (``chosen``) and the one an attacker wants (``rejected``)."""

    chosen: EncodedDemonstration
    rejected: EncodedDemonstration

    @property
    def prompt(self) -> Prompt:
        """The prompt of both."""
        return self.chosen.prompt


@dataclass(frozen=True)
class PairBatch(Batch):
    """``B`` pairs: row b of ``chosen`` and row b of ``rejected`` answer one prompt."""

    chosen: SupervisedBatch
    rejected: SupervisedBatch

    def __len__(self) -> int:
        return len(self.chosen)

    def split(self, size: int) -> Iterator[PairBatch]:
        """Cut the pairs into ``ceil(B / size)`` micro-batches, in order."""
        for rows in torch.arange(len(self), device=self.chosen.mask.device).split(size):
            yield PairBatch(self.chosen.take(rows), self.rejected.take(rows))


@dataclass(frozen=True)
class AttackBatch(Batch):
    """One simulated attack: the attacker's learning rate, its K batches, and the pairs that are held against it."""

    name: str
    learning_rate: float
    batches: tuple[SupervisedBatch, ...]
    pairs: PairBatch


@dataclass(frozen=True)
class TamperBatch(Batch):
    """What one outer step sees: its attacks, and the rows to keep."""

    attacks: tuple[AttackBatch, ...]
    retain: SupervisedBatch

    def __len__(self) -> int:
        return len(self.retain)


class TamperLoader(TrainingLoader[EncodedDemonstration, TamperBatch]):
    """The training stream of rows to keep, and at each of its places the attacks drawn for that place.

    Args:
        rows: the rows to keep; a stream as in :class:`~frpo.data.loader.TrainingLoader`.
        attacks: by name, with the encoded rows of each.
        pairs: what is held against them.
        attacks_per_step: attacks of one outer step.
        settings: the other arguments of the stream.
    """

    noun = "rows to keep"

    def __init__(
        self,
        rows: Sequence[EncodedDemonstration],
        *,
        attacks: Mapping[str, tuple[Attack, Sequence[EncodedDemonstration]]],
        pairs: Sequence[EncodedPair],
        attacks_per_step: int,
        **settings: Any,
    ) -> None:
        super().__init__(rows, **settings)
        self.attacks, self.pairs, self.attacks_per_step = attacks, pairs, attacks_per_step

    def collate(self, rows: list[EncodedDemonstration], positions: list[int]) -> TamperBatch:
        """The rows to keep at ``positions``, and the attacks drawn for that place: the same ones on every rank."""
        place = positions[0] - self.rank * self.batch_size
        attacks = tuple(self._attack(place, number) for number in range(self.attacks_per_step))
        return TamperBatch(attacks, collate_demonstrations(rows, self.pad_token_id))

    def _attack(self, place: int, number: int) -> AttackBatch:
        draws = np.random.Philox(key=_key(self.seed, place, number, "choice")).random_raw(3)
        name = self._name(int(draws[0]) / 2**64)
        attack, rows = self.attacks[name]
        learning_rate = attack.learning_rates[int(draws[1]) % len(attack.learning_rates)]
        steps = attack.steps[int(draws[2]) % len(attack.steps)]
        drawn = self._draw(rows, steps, _key(self.seed, place, number, "attack"))
        (pairs,) = self._draw(self.pairs, 1, _key(self.seed, place, number, "pairs"))
        batches = tuple(collate_demonstrations(batch, self.pad_token_id) for batch in drawn)
        return AttackBatch(name, learning_rate, batches, collate_pairs(pairs, self.pad_token_id))

    def _name(self, share: float) -> str:
        names = list(self.attacks)
        weights = np.cumsum([self.attacks[name][0].weight for name in names])
        return names[int(np.searchsorted(weights, share * weights[-1], side="right"))]

    def _draw(self, rows: Sequence[Any], batches: int, key: np.ndarray) -> list[list[Any]]:
        """This rank's share of ``batches`` global batches, drawn without replacement while the rows last."""
        order = permutation(len(rows), int(key[0]), int(key[1]))
        step, first = self.batch_size * self.world_size, self.rank * self.batch_size
        starts = (batch * step + first for batch in range(batches))
        return [[rows[order[i % len(rows)]] for i in range(start, start + self.batch_size)] for start in starts]


class OrderedPairs(OrderedLoader[EncodedPair, PairBatch]):
    """One pass over pairs."""

    noun = "pairs"

    def collate(self, rows: list[EncodedPair], positions: list[int]) -> PairBatch:
        """See :func:`collate_pairs`."""
        return collate_pairs(rows, self.pad_token_id)


def collate_pairs(rows: Sequence[EncodedPair], pad_token_id: int) -> PairBatch:
    """Pad both answers of each pair on the right to the longest of their kind."""
    chosen, rejected = [row.chosen for row in rows], [row.rejected for row in rows]
    return PairBatch(collate_demonstrations(chosen, pad_token_id), collate_demonstrations(rejected, pad_token_id))


def _key(seed: int, place: int, number: int, stream: str) -> np.ndarray:
    """Key of a random stream of its own, uint64 [2]."""
    entropy = (seed, place, number, STREAMS.index(stream))
    return np.random.SeedSequence(entropy).generate_state(2, dtype=np.uint64)
