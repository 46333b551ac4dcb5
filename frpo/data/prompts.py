"""The prompts of a run: read, tokenized and handed out to the ranks."""

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from frpo.data.encoding import EncodedPrompt, encode
from frpo.data.loader import EvaluationLoader, PromptLoader
from frpo.data.sources import PromptSource

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


class PromptDataModule(LightningDataModule):
    """Prompts for policy optimisation, tokenized with the LightningModule's tokenizer.

    Args:
        train: Prompts to train on.
        val: Prompts of the validation loop.
        test: Prompts of the test loop.
        batch_size: Training prompts per rank and step.
        val_batch_size: Validation and test prompts per rank and batch; null takes ``batch_size``.
        max_prompt_length: Tokens a prompt may have, chat template included.
        on_long_prompt: Leave longer prompts out (``drop``; counted in :attr:`dropped`), or stop (``error``).
        shuffle: Permute the training prompts in every epoch.
        seed: Of those permutations.

    The training loader goes on from a checkpoint at the exact next batch, see :class:`~frpo.data.loader.PromptLoader`.
    """

    dropped: dict[str, int]
    """Prompts left out for their length, by stage (``train``, ``val``, ``test``)."""
    tasks: set[str]
    """Tasks of the prompts of the stage that was set up."""

    def __init__(
        self,
        train: PromptSource | None = None,
        val: PromptSource | None = None,
        test: PromptSource | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_prompt_length: int = 1024,
        on_long_prompt: Literal["drop", "error"] = "drop",
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least_one = {
            "batch_size": batch_size,
            "val_batch_size": val_batch_size,
            "max_prompt_length": max_prompt_length,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if on_long_prompt not in ("drop", "error"):
            raise ValueError(f"on_long_prompt: got {on_long_prompt!r}, expected 'drop' or 'error'")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: got {seed}, expected 0 to 2**63 - 1")
        self.sources: dict[Stage, PromptSource | None] = {"train": train, "val": val, "test": test}
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.max_prompt_length = max_prompt_length
        self.on_long_prompt = on_long_prompt
        self.shuffle = shuffle
        self.seed = seed
        self.dropped = {}
        self.tasks = set()
        self._train: PromptLoader | None = None
        self._evaluation: dict[Stage, EvaluationLoader] = {}

    def prepare_data(self) -> None:
        """Let the sources fetch what they read, on one process of each machine."""
        for source in self.sources.values():
            if source is not None:
                source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the prompts of a stage. Raises ``ValueError`` before the first step of what is wrong."""
        trainer = self.trainer
        if trainer is None:
            raise ValueError(
                "PromptDataModule.setup was called without a Trainer, which knows the tokenizer and the ranks; "
                "hand the data module to trainer.fit(module, datamodule=...)"
            )
        self._check_stage(stage)
        _check_trainer(trainer)
        module = trainer.lightning_module
        tokenizer = _tokenizer(module)
        loaded = {name: self._load(name, tokenizer) for name in STAGES[stage] if self.sources[name] is not None}
        self.tasks = {row.prompt.task for rows in loaded.values() for row in rows}
        reward = getattr(module, "reward", None)
        if reward is not None:
            reward.check_tasks(self.tasks)
        # Under tensor parallelism several ranks read the same prompts: the strategy knows which.
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        for name, rows in loaded.items():
            self._build(name, rows, tokenizer.pad_token_id, ranks["num_replicas"], ranks["rank"])

    def _check_stage(self, stage: str | None) -> None:
        required = REQUIRED.get(stage)
        if required is not None and self.sources[required] is None:
            raise ValueError(
                f"the data module has no `{required}` source; set "
                f"`data.init_args.{required}` to a source, frpo.data.sources.FileSource say"
            )

    def _build(self, stage: Stage, rows: list[EncodedPrompt], pad_token_id: int, world_size: int, rank: int) -> None:
        if stage == "train":
            self._train = PromptLoader(
                rows,
                batch_size=self.batch_size,
                pad_token_id=pad_token_id,
                world_size=world_size,
                rank=rank,
                shuffle=self.shuffle,
                seed=self.seed,
            )
        else:
            self._evaluation[stage] = EvaluationLoader(
                rows,
                batch_size=self.val_batch_size,
                pad_token_id=pad_token_id,
                world_size=world_size,
                rank=rank,
            )

    def train_dataloader(self) -> PromptLoader:
        """The training stream. One object for the whole fit, so that reloading does not start it again."""
        assert self._train is not None, "setup('fit') comes first and refuses a missing `train`"
        return self._train

    def val_dataloader(self) -> EvaluationLoader:
        """The validation prompts in order; none where there is no ``val`` source."""
        if "val" not in self._evaluation:
            warnings.filterwarnings("ignore", message="Total length of `EvaluationLoader` across ranks is zero")
            return EvaluationLoader([], batch_size=self.val_batch_size, pad_token_id=0)
        return self._evaluation["val"]

    def test_dataloader(self) -> EvaluationLoader:
        """The test prompts in order."""
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

    def _load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
        source = self.sources[stage]
        assert source is not None
        rows = encode(source.prompts(), tokenizer)
        kept = [row for row in rows if len(row.ids) <= self.max_prompt_length]
        self.dropped[stage] = len(rows) - len(kept)
        if self.dropped[stage]:
            self._report_long(stage, rows, kept)
        return kept

    def _report_long(self, stage: Stage, rows: list[EncodedPrompt], kept: list[EncodedPrompt]) -> None:
        lengths = [len(row.ids) for row in rows]
        long = self.dropped[stage]
        found = (
            f"{stage}: {long} of {len(rows)} prompts ({long / len(rows):.1%}) are longer than "
            f"max_prompt_length={self.max_prompt_length} tokens, the longest has {max(lengths)}"
        )
        if self.on_long_prompt == "error":
            raise ValueError(f"{found}; raise `max_prompt_length` or set `on_long_prompt: drop`")
        if not kept:
            raise ValueError(f"{found}, the shortest {min(lengths)}: none is left; raise `max_prompt_length`")
        if self.trainer is not None and self.trainer.is_global_zero:
            log.warning("%s; they are left out", found)


def _check_trainer(trainer: Trainer) -> None:
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise ValueError(
            "Trainer(overfit_batches=...) does not hold this loader to the same batches; set "
            "`data.init_args.train.init_args.limit` to the number of rows to overfit on"
        )
    if type(trainer.precision_plugin).convert_input is not Precision.convert_input:
        raise ValueError(
            f"Trainer(precision={trainer.precision!r}, strategy={type(trainer.strategy).__name__}) converts every "
            "batch to its dtype, which batches of prompts do not allow; set `trainer.precision` to 32-true or "
            "bf16-mixed, and the dtype of the weights in `model.init_args.policy.init_args.dtype`"
        )


def _tokenizer(module: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer = module.tokenizer
    except AttributeError as error:
        raise ValueError(
            f"{type(module).__name__} has no `tokenizer`, which PromptDataModule tokenizes with; use it with "
            "frpo.modules.policy_optimization.PolicyOptimization"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no pad token to fill batches with; set its pad_token"
        )
    return tokenizer
