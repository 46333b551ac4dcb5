"""What every data module here shares: rows tokenized with the module's tokenizer, and cut for the ranks."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from frpo.data.loader import OrderedLoader, TrainingLoader
from frpo.data.strategy import check_strategy

log = logging.getLogger(__name__)

Stage = Literal["train", "val", "test"]
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


class RowsDataModule(LightningDataModule):
    """Reads the rows of a stage, tokenizes them, and hands them out in batches by rank.

    A subclass sets ``sources`` by stage and says how rows are read (:meth:`load`) and batched (:meth:`loader`). Its
    training loader goes on from a checkpoint at the exact next batch, see :class:`~frpo.data.loader.TrainingLoader`.
    """

    dropped: dict[str, int]
    """Rows left out for their length, by stage (``train``, ``val``, ``test``)."""
    tasks: set[str]
    """Tasks of the rows of the stage that was set up."""

    def __init__(self, sources: Mapping[Stage, Source | None]) -> None:
        super().__init__()
        self.sources = sources
        self.dropped = {}
        self.tasks = set()
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
        # Batches hold integers and masks: there is nothing to convert, and half precision cannot walk frozen records.
        trainer.precision_plugin.convert_input = _unchanged  # type: ignore[method-assign, assignment]
        module = trainer.lightning_module
        tokenizer = self._tokenizer(module)
        loaded = {name: self.load(name, tokenizer) for name in STAGES[stage] if self.sources.get(name) is not None}
        self.tasks = {row.prompt.task for rows in loaded.values() for row in rows}
        reward = getattr(module, "reward", None)
        if reward is not None:
            reward.check_tasks(self.tasks)
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

    def _tokenizer(self, module: Any) -> PreTrainedTokenizerBase:
        try:
            tokenizer: PreTrainedTokenizerBase = module.tokenizer
        except AttributeError as error:
            raise ValueError(
                f"{type(module).__name__} has no `tokenizer`, which {type(self).__name__} tokenizes with; use it with "
                f"{self.module_class}"
            ) from error
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no pad token to fill batches with; set its pad_token"
            )
        return tokenizer

    module_class = "frpo.modules.policy_optimization.PolicyOptimization"
    """A module that it serves, for messages."""

    def train_dataloader(self) -> TrainingLoader[Any, Any]:
        """The training stream. One object for the whole fit, so that reloading does not start it again."""
        assert self._train is not None, "setup('fit') comes first and refuses a missing `train`"
        return self._train

    def val_dataloader(self) -> OrderedLoader[Any, Any]:
        """The validation rows in order; none where there is no ``val`` source."""
        if "val" not in self._evaluation:
            warnings.filterwarnings("ignore", message="Total length of `.*Loader` across ranks is zero")
            return self.ordered_loader([], pad_token_id=0)
        return self._evaluation["val"]

    def test_dataloader(self) -> OrderedLoader[Any, Any]:
        """The test rows in order."""
        return self._evaluation["test"]

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
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected 0 to 2**63 - 1")


def too_long(stage: Stage, noun: str, lengths: Sequence[int], limit: int, option: str) -> str | None:
    """The words for rows longer than ``limit`` tokens, None where no row is."""
    long = sum(length > limit for length in lengths)
    if not long:
        return None
    return (
        f"{stage}: {long} of {len(lengths)} {noun} ({long / len(lengths):.1%}) are longer than "
        f"{option}={limit} tokens, the longest has {max(lengths)}"
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _check_trainer(trainer: Trainer) -> None:
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise ValueError(
            "Trainer(overfit_batches=...) does not hold this loader to the same batches; set "
            "`data.init_args.train.init_args.limit` to the number of rows to overfit on"
        )
    check_strategy(trainer)
