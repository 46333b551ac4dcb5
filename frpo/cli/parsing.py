"""A command line and its files turned into module, data and trainer: LightningCLI without its subcommands.

``run=False``: with LightningCLI's subcommands ``${output_dir}`` would have to be written ``${fit.output_dir}``, and
the hyperparameters in a checkpoint would override the configuration.
"""

from __future__ import annotations

import re
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

import frpo
from frpo.cli.arguments import Arguments, split_arguments
from frpo.cli.check import Checker, Group
from frpo.cli.checkpoint import check_checkpoint, find_checkpoint
from frpo.cli.hints import REQUIRED, Field, fields, import_class
from frpo.cli.references import restore_references
from frpo.data.prompts.module import PromptDataModule
from frpo.evaluation.callback import Evaluation
from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError, clipped, suggestion
from frpo.foundation.redaction import redact_config
from frpo.modules.policy_optimization import PolicyOptimization
from frpo.run.end_together import EndTogether
from frpo.run.run_record import RunRecord

MAX_LINE = 1000  # characters of a line of a message: jsonargparse quotes whole values
CONFIG_FILE = "config.yaml"
OUTPUT_DIR = "outputs/${name}"
DATA_DIR = "data"
EVALUATION_HELP = "See frpo.evaluation.callback.Evaluation."
RESERVED = {"default_root_dir": "is output_dir; write output_dir instead"}
MANUAL = {"gradient_clip_val": (None, "max_grad_norm"), "accumulate_grad_batches": (1, "micro_batch_size")}


class FrpoCLI(LightningCLI):
    """One command line parsed and its classes built; nothing heavy is loaded and nothing runs yet."""

    def __init__(
        self,
        command: str,
        args: list[str],
        model: type[LightningModule] = PolicyOptimization,
        data: type[LightningDataModule] = PromptDataModule,
        trainer: dict[str, Any] | None = None,
    ) -> None:
        """Parse ``args``; ``model``, ``data`` and ``trainer`` are what stands where the configuration names none."""
        self.command = command
        self.arguments: Arguments = split_arguments(args)
        self.classes = {
            "model": _chosen_class(self.arguments, "model", LightningModule, model),
            "data": _chosen_class(self.arguments, "data", LightningDataModule, data),
        }
        super().__init__(
            LightningModule,
            LightningDataModule,
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=trainer,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": f"frpo {command}",
                "usage": f"frpo {command} --config FILE [--config FILE ...] [--key value ...]",
                "description": "--print_config shows the configuration in full, --model.help CLASS what a class takes.",
                "print_config": None,
                "parser_mode": "omegaconf+",
                "allow_abbrev": False,
                "exit_on_error": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declare the top-level settings; ``${...}`` reaches them wherever they are given."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run.")
        parser.add_argument("--output_dir", type=str, default=OUTPUT_DIR, help="Folder for all that the run writes.")
        parser.add_argument("--data_dir", type=str, default=DATA_DIR, help="Folder of the data files.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint to go on from: a file, or 'last'."
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Fit into an output_dir that holds another run's checkpoints."
        )
        for name, setting in _evaluation_settings().items():
            option = f"--evaluation.{name}"
            parser.add_argument(option, type=setting.hint, default=setting.default, help=EVALUATION_HELP)
        parser.link_arguments("output_dir", "trainer.default_root_dir")
        # The default is the class that is chosen in the end: a swap would keep same-named defaults of the old class.
        for key, cls in self.classes.items():
            parser.set_defaults({key: {"class_path": f"{cls.__module__}.{cls.__qualname__}"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse files, then options; every refusal is a :class:`ConfigError`."""
        checker = Checker(_top_level(), self.classes)
        findings = checker.check(self.arguments)
        if findings.refused and not self.arguments.help:
            raise ConfigError("\n".join(findings.refused))
        self._warn(findings.warned)
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.config = parser.parse_args(self.arguments.words(Path(folder)))
            except ArgumentError as error:
                raise ConfigError("\n".join(findings.explained) or _condensed(str(error))) from error
            except OmegaConfBaseException as error:
                raise ConfigError(_interpolation(error)) from error
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
                said = f"the configuration cannot be parsed: {type(error).__name__}: {error}"
                raise ConfigError("\n".join(findings.explained) or _condensed(said)) from error
        self.references = checker.references
        if self.arguments.print_config:
            print(self.config_text(), end="")
            sys.exit(0)

    @rank_zero_only
    def _warn(self, texts: list[str]) -> None:
        for text in texts:
            print(f"frpo {self.command}: warning: {text}", file=sys.stderr)

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything: {error}") from error

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what a constructor refuses is a :class:`ConfigError` too."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, MisconfigurationException) as error:
            raise ConfigError(_condensed(str(error))) from error
        if not self.model.automatic_optimization:
            self._check_manual_optimization()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the callbacks that runs get without naming them.

        One runs the suites of ``evaluation`` where it names any, one ends several ranks together.
        """
        trainer = super().instantiate_trainer(**kwargs)
        settings = self.config_init.evaluation.as_dict()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        several = trainer.num_devices * trainer.num_nodes > 1
        if several and not any(isinstance(callback, EndTogether) for callback in callbacks):
            callbacks.insert(0, EndTogether())
        if settings["suites"]:
            # The evaluation of a step is done before its checkpoint, and checkpoint callbacks come last.
            last = next((i for i, c in enumerate(callbacks) if isinstance(c, ModelCheckpoint)), len(callbacks))
            callbacks.insert(last, Evaluation(str(self.output_dir), **settings))
        elif settings != {name: setting.default for name, setting in _evaluation_settings().items()}:
            raise ConfigError("evaluation: got settings without suites; name some, as conf/evaluation/tiny.yaml does")
        return trainer

    def _check_manual_optimization(self) -> None:
        name = type(self.model).__name__
        for key, (harmless, instead) in MANUAL.items():
            value = self.config.trainer[key]
            if value != harmless:
                raise ConfigError(
                    f"trainer.{key}: got {value}, but {name} takes its own optimiser steps, where the Trainer cannot "
                    f"do this; write model.init_args.{instead} instead"
                )

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output_dir)

    def config_text(self) -> str:
        """The whole configuration as YAML, defaults and environment filled in; give it back to run the same."""
        text = restore_references(self.parser.dump(self.config, skip_none=False), self.references)
        return f"# frpo {frpo.__version__}\n{text}"

    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from, found and checked, or None."""
        if self.config.ckpt_path is None:
            return None
        path = find_checkpoint(self.config.ckpt_path, self._checkpoint_folders())
        check_checkpoint(path, for_training=self.command == "fit")
        return path

    def _checkpoint_folders(self) -> list[Path]:
        own = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return list(dict.fromkeys(Path(folder).absolute() for folder in (*own, self.output_dir / "checkpoints")))

    @rank_zero_only
    def record_config(self) -> None:
        """Hand the configuration to the callback that records runs, or write it where there is none."""
        recorders = [callback for callback in self.trainer.callbacks if isinstance(callback, RunRecord)]  # type: ignore[attr-defined]
        for recorder in recorders:
            recorder.config_text = self.config_text()
        if not recorders:
            write_whole(self.output_dir / CONFIG_FILE, redact_config(self.config_text()))

    def earlier_checkpoints(self) -> list[Path]:
        """The checkpoints of an earlier run in the way of this one; refused unless ``overwrite`` is set."""
        taken = sorted(file for folder in self._checkpoint_folders() for file in folder.glob("*.ckpt"))
        if self.config.ckpt_path is not None:
            return []
        if taken and not self.config.overwrite:
            raise ConfigError(
                f"output_dir: {self.output_dir} holds the checkpoints of a run ({taken[0].name}); go on with it by "
                "--ckpt_path last, write elsewhere by --name NAME or --output_dir DIR, or replace it by "
                "--overwrite true"
            )
        return taken


def _chosen_class(arguments: Arguments, key: str, base: type, default: type) -> Callable[..., Any]:
    class_path = arguments.last_class(key)
    if class_path is None:
        return default
    try:
        return import_class(class_path, base)
    except ConfigError as error:
        raise ConfigError(f"{key}.class_path: {error}") from error


def _top_level() -> dict[str, Field]:
    trainer = fields(Trainer.__init__, skip=1)
    assert trainer is not None, "Trainer takes named arguments only"
    hints: dict[str, Any] = {
        "seed_everything": bool | int,
        "trainer": Group({k: v for k, v in trainer.items() if k not in RESERVED}, RESERVED),
        "model": LightningModule,
        "data": LightningDataModule,
        "name": str,
        "output_dir": str,
        "data_dir": str,
        "ckpt_path": str | None,
        "overwrite": bool,
        "evaluation": Group(_evaluation_settings(), {"output_dir": "is that of the run; write output_dir instead"}),
    }
    defaults = {"output_dir": OUTPUT_DIR, "data_dir": DATA_DIR}
    return {name: Field(hint, defaults.get(name)) for name, hint in hints.items()}


def _evaluation_settings() -> dict[str, Field]:
    """The settings of the callback that runs suites; no suites, no callback."""
    settings = fields(Evaluation.__init__, skip=1)
    assert settings is not None, "Evaluation takes named arguments only"
    return {
        name: Field(setting.hint | None, None) if setting.default is REQUIRED else setting
        for name, setting in settings.items()
        if name != "output_dir"
    }


def _condensed(message: str) -> str:
    """Drop what only jsonargparse's authors need from its message, and keep it short."""
    noise = re.compile(r"^\s*(- )?(Expected a <class 'NoneType'>|Given value|Subtypes:|Errors:|Does not validate)")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip() and not noise.match(line)]
    return "\n".join(clipped(line, MAX_LINE) for line in lines[:8])


def _interpolation(error: OmegaConfBaseException) -> str:
    text = str(error).splitlines()[0]
    where = f"{error.full_key}: " if error.full_key else ""
    variable = re.search(r"Environment variable '([^']+)' not found", text)
    if variable:
        name = variable[1]
        return (
            f"{where}the environment variable {name} is not set; set it (export {name}=...), or give a default: "
            f"${{oc.env:{name},DEFAULT}}"
        )
    key = re.search(r"'([^']+)'", text)
    if isinstance(error, InterpolationKeyError) and key:
        return f"{where}${{{key[1]}}} names no setting{suggestion(key[1], _top_level())}"
    return f"{where}{text}"
