"""What every data module here shares: rows tokenized with the module's tokenizer, and cut for the ranks."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from frpo.data.loader import OrderedLoader, TrainingLoader
from frpo.data.sources import Source
from frpo.foundation import require
from frpo.types import DataFacts, Stage

log = logging.getLogger(__name__)

Row = TypeVar("Row")

STAGES: dict[str | None, tuple[Stage, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
    None: ("train", "val", "test"),
}
REQUIRED: dict[str | None, Stage] = {"fit": "train", "validate": "val", "test": "test"}


@runtime_checkable
class Learner(Protocol):
    """A module that a data module serves: :class:`~frpo.modules.policy_module.PolicyModule`, say."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizes the rows."""

    def on_data_read(self, facts: DataFacts) -> None:
        """What was read; raise ``ValueError`` where it cannot be trained on."""


class RowsDataModule(LightningDataModule):
    """Reads the rows of a stage, tokenizes them, and hands them out in batches by rank.

    A subclass says how rows are read (:meth:`load`) and by which loaders they are batched (:attr:`training`,
    :attr:`ordered`). Training goes on from a checkpoint at the exact next batch, see
    :class:`~frpo.data.loader.TrainingLoader`.

    Args:
        sources: By stage; null where there is none.
        batch_size: Rows per rank and step.
        val_batch_size: Rows of validation and test per rank and batch; null takes ``batch_size``.
        shuffle: Permute the training rows in every epoch.
        seed: Of those permutations.
    """

    training: ClassVar[type[TrainingLoader[Any, Any]]]
    """The stream of training rows."""
    ordered: ClassVar[type[OrderedLoader[Any, Any]]]
    """One pass over rows of validation or test."""

    dropped: dict[str, int]
    """Rows left out for their length, by stage (``train``, ``val``, ``test``)."""
    max_tokens: int
    """Tokens that a row may have."""
    packing: bool
    """Whether a row of a batch holds several demonstrations."""

    def __init__(
        self,
        sources: Mapping[Stage, Source | None],
        *,
        batch_size: int,
        val_batch_size: int | None,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.sources = sources
        self.batch_size = require.number(f"{name}.batch_size", batch_size, at_least=1)
        require.number(f"{name}.val_batch_size", val_batch_size, at_least=1)
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.seed, self.shuffle = require.seed(f"{name}.seed", seed), shuffle
        self.dropped = {}
        self.max_tokens, self.packing = 0, False
        self._train: TrainingLoader[Any, Any] | None = None
        self._evaluation: dict[Stage, OrderedLoader[Any, Any]] = {}

    @abstractmethod
    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """Read and tokenize the rows of ``stage``; each has a ``prompt``."""

    def stream(self) -> dict[str, Any]:
        """What :attr:`training` takes beside rows, batch size, order and ranks."""
        return {}

    def training_loader(self, rows: list[Any], **cut: int) -> TrainingLoader[Any, Any]:
        """The stream over ``rows``; ``cut`` is the padding token, and which rank of how many this is."""
        stream = {"shuffle": self.shuffle, **self.stream(), **cut}
        return self.training(rows, batch_size=self.batch_size, seed=self.seed, **stream)

    def ordered_loader(self, rows: list[Any], **cut: int) -> OrderedLoader[Any, Any]:
        """One pass over ``rows``; ``cut`` as for :meth:`training_loader`."""
        return self.ordered(rows, batch_size=self.val_batch_size, **cut)

    def prepare_data(self) -> None:
        """Let the sources fetch what they read, on one process of each machine."""
        for source in self.sources.values():
            if source is not None:
                source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the rows of a stage. Raises ``ValueError`` before the first step of what is wrong."""
        trainer = self.trainer
        if trainer is None:
            raise ValueError(
                f"{type(self).__name__}.setup was called without a Trainer, which knows the tokenizer and the ranks; "
                "hand the data module to trainer.fit(module, datamodule=...)"
            )
        self._check_stage(stage)
        _check_trainer(trainer)
        learner, tokenizer = self._learner(trainer.lightning_module)
        loaded = {name: self.load(name, tokenizer) for name in STAGES[stage] if self.sources.get(name) is not None}
        tasks = frozenset(row.prompt.task for rows in loaded.values() for row in rows)
        learner.on_data_read(DataFacts(tasks, self.max_tokens, self.packing))
        # Under tensor parallelism several ranks read the same rows: the strategy knows which.
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        cut = {"pad_token_id": tokenizer.pad_token_id, "world_size": ranks["num_replicas"], "rank": ranks["rank"]}
        for name, rows in loaded.items():
            if name == "train":
                self._train = self.training_loader(rows, **cut)
            else:
                self._evaluation[name] = self.ordered_loader(rows, **cut)

    def _check_stage(self, stage: str | None) -> None:
        required = REQUIRED.get(stage)
        if required is None or self.sources.get(required) is not None:
            return
        if required not in self.sources:
            raise ValueError(f"{type(self).__name__} has rows for {' and '.join(self.sources)}, none for {required}")
        raise ValueError(
            f"the data module has no `{required}` source; set `data.init_args.{required}` to a source, "
            f"{self.example} say"
        )

    example = "frpo.data.prompts.sources.FileSource"
    """A source, for messages."""

    def _learner(self, module: Any) -> tuple[Learner, PreTrainedTokenizerBase]:
        if not isinstance(module, Learner):
            raise ValueError(
                f"{type(module).__name__} has no `tokenizer` and `on_data_read`, by which {type(self).__name__} "
                f"tokenizes rows and says what it read; use it with {self.module_class}"
            )
        tokenizer = module.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no pad token to fill batches with; set its pad_token"
            )
        return module, tokenizer

    module_class = "frpo.modules.policy_optimization.PolicyOptimization"
    """A module that it serves, for messages."""

    def train_dataloader(self) -> TrainingLoader[Any, Any] | Unconverted:
        """The training stream. It goes on, however often it is asked for."""
        assert self._train is not None, "setup('fit') comes first and refuses a missing `train`"
        return self._served(self._train)

    def val_dataloader(self) -> OrderedLoader[Any, Any] | Unconverted:
        """The validation rows in order; none where there is no ``val`` source."""
        if "val" not in self._evaluation:
            warnings.filterwarnings("ignore", message="Total length of `.*Loader` across ranks is zero")
            return self.ordered_loader([], pad_token_id=0)
        return self._served(self._evaluation["val"])

    def test_dataloader(self) -> OrderedLoader[Any, Any] | Unconverted:
        """The test rows in order."""
        return self._served(self._evaluation["test"])

    def _served(self, loader: Any) -> Any:
        """``loader``, past a precision plugin that would convert its batches."""
        converts = type(self.trainer.precision_plugin).convert_input is not Precision.convert_input  # type: ignore[union-attr]
        return Unconverted(loader) if converts else loader

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The place in the training stream, for checkpoints.

        Lightning's fit loop saves it too, but does not restore it where the checkpoint was written between two
        epochs (``on_train_epoch_end``): training would start again at the first epoch's order.
        """
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, dict[str, int]]) -> None:
        """Go on in the training stream; nothing to do where a checkpoint is only validated or tested."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING and self._train is not None:
            self._train.load_state_dict(state_dict["train"])

    def short(
        self,
        stage: str,
        rows: Sequence[Row],
        lengths: Sequence[int],
        *,
        limit: int,
        option: str,
        noun: str,
        refuse: str = "",
    ) -> list[Row]:
        """The rows of up to ``limit`` tokens, the value of ``option``; the others are left out, with a warning.

        Raises ``ValueError`` where none is left, or where any is too long and ``refuse`` says what to write instead.
        """
        kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
        long = len(rows) - len(kept)
        found = (
            f"{stage}: {long} of {len(rows)} {noun} ({long / max(len(rows), 1):.1%}) are longer than {option}={limit} "
            f"tokens, the longest has {max(lengths, default=0)}, the shortest {min(lengths, default=0)}"
        )
        if long and refuse:
            raise ValueError(f"{found}; raise `{option}` or write `{refuse}`")
        self.leave_out(stage, len(rows), len(kept), found, f"raise `{option}`")
        return kept

    def leave_out(self, stage: str, read: int, kept: int, found: str, remedy: str) -> None:
        """Count the rows that were left out and warn of them; raise ``ValueError`` where none is left."""
        self.dropped[stage] = read - kept
        if not kept:
            raise ValueError(f"{found}: none is left; {remedy}, or give a source with rows")
        if kept < read:
            self.warn(f"{found}; they are left out")

    def warn(self, text: str) -> None:
        """Log a warning, once a run."""
        if self.trainer is not None and self.trainer.is_global_zero:
            log.warning(text)


class Unconverted:
    """A loader whose batches reach the module as they are, whatever the Trainer's precision.

    Batches hold integers and masks: there is nothing to convert, and Lightning's half precision cannot walk frozen
    records. It passes over what is no record, and moving to the device unwraps it.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[_Wrapped]:
        return map(_Wrapped, self.loader)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream."""
        state: dict[str, int] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place in the stream."""
        self.loader.load_state_dict(state)


class _Wrapped:
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def to(self, device: Any) -> Any:
        """The batch itself, on ``device``."""
        return self.batch.to(device)


def _check_trainer(trainer: Trainer) -> None:
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise ValueError(
            "Trainer(overfit_batches=...) does not hold this loader to the same batches; set "
            "`data.init_args.train.init_args.limit` to the number of rows to overfit on"
        )
