"""What every data module here shares: rows tokenized with the module's tokenizer, and cut for the ranks."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from frpo.data.loader import OrderedLoader, TrainingLoader
from frpo.foundation import require
from frpo.types import DataFacts, Stage

log = logging.getLogger(__name__)

STAGES: dict[str | None, tuple[Stage, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
    None: ("train", "val", "test"),
}
REQUIRED: dict[str | None, Stage] = {"fit": "train", "validate": "val", "test": "test"}


class Source(Protocol):
    """Where the rows of a stage come from."""

    def prepare(self) -> None:
        """Fetch what is read, on one process of each machine."""


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

    A subclass sets ``sources`` by stage and says how rows are read (:meth:`load`) and batched (:meth:`loader`). Its
    training loader goes on from a checkpoint at the exact next batch, see :class:`~frpo.data.loader.TrainingLoader`.
    """

    dropped: dict[str, int]
    """Rows left out for their length, by stage (``train``, ``val``, ``test``)."""
    max_tokens: int
    """Tokens that a row may have."""
    packing: bool
    """Whether a row of a batch holds several demonstrations."""

    def __init__(self, sources: Mapping[Stage, Source | None]) -> None:
        super().__init__()
        self.sources = sources
        self.dropped = {}
        self.max_tokens, self.packing = 0, False
        self._train: TrainingLoader[Any, Any] | None = None
        self._evaluation: dict[Stage, OrderedLoader[Any, Any]] = {}

    @abstractmethod
    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """Read and tokenize the rows of ``stage``; each has a ``prompt``."""

    @abstractmethod
    def training_loader(self, rows: list[Any], *, pad_token_id: int, **ranks: int) -> TrainingLoader[Any, Any]:
        """The stream over ``rows``; ``ranks`` are world_size and rank."""

    @abstractmethod
    def ordered_loader(self, rows: list[Any], *, pad_token_id: int, **ranks: int) -> OrderedLoader[Any, Any]:
        """One pass over ``rows``; ``ranks`` are world_size and rank."""

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

    def warn(self, text: str) -> None:
        """Log a warning, once a run."""
        if self.trainer is not None and self.trainer.is_global_zero:
            log.warning(text)


def check_choices(*, seed: int, **at_least_one: int | None) -> None:
    """Refuse a seed or a number out of range. None is a number that was left out."""
    for name, value in at_least_one.items():
        require.number(name, value, at_least=1)
    require.seed("seed", seed)


def too_long(stage: Stage, noun: str, lengths: Sequence[int], limit: int, option: str) -> str | None:
    """The words for rows longer than ``limit`` tokens, None where no row is."""
    long = sum(length > limit for length in lengths)
    if not long:
        return None
    return (
        f"{stage}: {long} of {len(lengths)} {noun} ({long / len(lengths):.1%}) are longer than "
        f"{option}={limit} tokens, the longest has {max(lengths)}"
    )


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
