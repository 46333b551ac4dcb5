"""Which rows are read when, and by which rank: a resumable stream for training, one ordered pass for evaluation.

Batches are whole for the run: the global batch holds ``batch_size * world_size`` rows in stream order, and rank r
reads its r-th slice. So the rows of a step depend on that product alone, not on how it is split over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Generic, TypeVar

import numpy as np

Row = TypeVar("Row")
Batch = TypeVar("Batch")


def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``rows`` rows in ``epoch``: int64 [rows], a function of its arguments alone.

    Sorts the raw words of a counter-based generator (Philox) keyed by (seed, epoch). Raw words are fixed by the
    algorithm, while the shuffles built on them may change between library versions.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable")


class TrainingLoader(ABC, Generic[Row, Batch]):
    """The training stream: epochs of permuted rows in global batches, cut for one rank, resumable at any batch.

    Iterating yields ``len(self)`` batches from where the stream stands, and goes on into the next epoch's order where
    this one has no whole global batch left. The tail of an epoch that fills no global batch is left out; its rows
    come in later epochs. The stream stands in two numbers, the epoch and the rows of it consumed, so a run can go
    on with another batch size or world size.

    Args:
        rows: The rows, the same on every rank.
        batch_size: Rows per rank and step.
        world_size: Ranks that read different rows.
        rank: This one.
        pad_token_id: Fills up shorter rows.
        shuffle: Permute each epoch; otherwise every epoch is in the order of the rows.
        seed: Of the permutations, 0 to 2**63 - 1.
    """

    noun: ClassVar[str]
    """What messages call the rows."""
    fixed: ClassVar[dict[str, str]] = {
        "rows": "restore the data, its `limit` and length limit (and the tokenizer, which decides what is too long)",
        "shuffle": "restore `shuffle`",
        "seed": "restore `seed`",
    }
    """Entries of the state that a run must share with its checkpoint, and what to do where it does not."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        pad_token_id: int,
        world_size: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if len(rows) < batch_size * world_size:
            raise ValueError(
                f"{len(rows)} training {self.noun} do not fill one step of batch_size * devices = {batch_size} * "
                f"{world_size} = {batch_size * world_size}; lower `batch_size` or the number of devices, or add rows"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.world_size = world_size
        self.rank = rank
        self.pad_token_id = pad_token_id
        self.shuffle = shuffle
        self.seed = seed
        self._epoch = 0
        self._consumed = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.rows) // (self.batch_size * self.world_size)

    @abstractmethod
    def collate(self, rows: list[Row], positions: list[int]) -> Batch:
        """A batch of ``rows``; ``positions`` are their numbers in the stream of the run, none of them used twice."""

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            yield self._next()

    def _next(self) -> Batch:
        """The batch at the stream's place. Moves the place first: a checkpoint of this step counts its rows."""
        step = self.batch_size * self.world_size
        if len(self.rows) - self._consumed < step:
            self._epoch, self._consumed = self._epoch + 1, 0
        epoch, first = self._epoch, self._consumed + self.rank * self.batch_size
        self._consumed += step
        indices = range(first, first + self.batch_size)
        order = self._order_of(epoch)
        return self.collate([self.rows[order[i]] for i in indices], [epoch * len(self.rows) + i for i in indices])

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return self._order[1]

    def order(self, epoch: int) -> np.ndarray:
        """The order of the rows in ``epoch``, int64 [rows]: a function of the loader's settings and the epoch."""
        rows = len(self.rows)
        return permutation(rows, self.seed, epoch) if self.shuffle else np.arange(rows)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, as plain integers, the same on every rank. Saved by Lightning's fit loop."""
        return {
            "epoch": self._epoch,
            "consumed": self._consumed,
            "rows": len(self.rows),
            "shuffle": int(self.shuffle),
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` stood. Batch size and world size may differ.

        Raises ``ValueError`` where the rows, the seed or the shuffling do, since the order would be another one.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(
                f"the checkpoint's place in the training {self.noun} has the keys {sorted(state)}, expected "
                f"{sorted(own)}; it was written by another kind of loader, so training cannot go on from it"
            )
        for name, hint in self.fixed.items():
            if state[name] != own[name]:
                raise ValueError(
                    f"cannot go on in the training {self.noun}: the checkpoint was written with {name}="
                    f"{state[name]}, this run has {name}={own[name]}; {hint}, or start without `ckpt_path`"
                )
        self._epoch, self._consumed = int(state["epoch"]), int(state["consumed"])


class OrderedLoader(ABC, Generic[Row, Batch]):
    """One pass over all rows in order, every row on exactly one rank, the same number of batches on every rank.

    Batches may be short at the end.

    Args:
        rows: The rows, the same on every rank.
        batch_size: Rows per rank and batch, at most.
        world_size: Ranks that read different rows.
        rank: This one.
        pad_token_id: Fills up shorter rows.
    """

    noun: ClassVar[str]
    """What messages call the rows."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        pad_token_id: int,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.rows = rows
        self.pad_token_id = pad_token_id
        self._slices = evaluation_slices(len(rows), batch_size, world_size, self.noun)[rank::world_size]

    def __len__(self) -> int:
        """Batches of the pass, the same on every rank."""
        return len(self._slices)

    @abstractmethod
    def collate(self, rows: list[Row], positions: list[int]) -> Batch:
        """A batch of ``rows``; ``positions`` are the row numbers."""

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._slices:
            yield self.collate([self.rows[i] for i in rows], list(rows))


def evaluation_slices(rows: int, batch_size: int, world_size: int, noun: str = "prompts") -> list[range]:
    """Cut ``rows`` rows into batches: slice ``step * world_size + rank`` for each step and rank, none of them empty.

    Steps are full but for the last, whose rows are spread evenly over the ranks; where it has fewer rows than ranks,
    it shares with the step before. Raises ``ValueError`` where some rank would still have an empty batch. No rows
    make no batches.
    """
    if rows == 0:
        return []
    step = batch_size * world_size
    steps = -(-rows // step)
    last = rows - (steps - 1) * step
    spread = steps - 1 if last >= world_size else steps - 2  # from this step on, rows are spread evenly
    left = rows - spread * step
    slots = (steps - spread) * world_size
    if spread < 0 or left < slots:
        raise ValueError(
            f"{rows} evaluation {noun} cannot be split over {world_size} devices in batches of {batch_size} so that "
            "every device has a row in every batch; lower the number of devices, add or drop rows, or "
            "raise `val_batch_size`"
        )
    bounds = [i * batch_size for i in range(spread * world_size)]
    bounds += [spread * step + i * left // slots for i in range(slots + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]
