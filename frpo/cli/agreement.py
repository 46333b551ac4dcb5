"""``frpo agreement``: how far judges agree with labels that people gave."""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentError
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser
from omegaconf.errors import OmegaConfBaseException

from frpo.cli.arguments import split_arguments
from frpo.cli.check import Checker, Group
from frpo.cli.hints import Field, fields
from frpo.evaluation.label_agreement import LabelAgreement, Measured
from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError

DESCRIPTION = """Measures rewards, and probes trained out of fold, against labels of 0 and 1: accuracy, balanced
accuracy, Cohen's kappa and area under the ROC curve, each with a 95% bootstrap interval."""


def main(args: list[str]) -> int:
    """Measure: ``frpo agreement --config FILE [--key value ...]``."""
    parser = _parser()
    arguments = split_arguments(args)
    findings = Checker(_top_level(), {}).check(arguments)
    if findings.refused and not arguments.help:
        raise ConfigError("\n".join(findings.refused))
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = parser.parse_args(arguments.words(Path(folder)))
            measurement: LabelAgreement = parser.instantiate(config).agreement
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from error
        except ArgumentError as error:
            raise ConfigError("\n".join(findings.explained) or str(error)) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
    try:
        found = measurement.measure()
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    print(table(found))
    if config.out is not None:
        rows = {name: asdict(measured) for name, measured in found.items()}
        write_whole(Path(config.out), json.dumps(rows, indent=2) + "\n")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="frpo agreement",
        description=DESCRIPTION,
        parser_mode="omegaconf+",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file; several apply in order")
    parser.add_argument("--data_dir", type=str, default="data", help="Folder of the data files.")
    parser.add_argument("--out", type=str | None, default=None, help="JSON file to write the figures to.")
    parser.add_class_arguments(LabelAgreement, "agreement")
    return parser


def _top_level() -> dict[str, Field]:
    settings = fields(LabelAgreement)
    assert settings is not None, "LabelAgreement takes named arguments only"
    return {
        "data_dir": Field(str, "data"),
        "out": Field(str | None, None),
        "agreement": Field(Group(settings, {}), None),
    }


def table(found: dict[str, Measured]) -> str:
    """One line per judge: metrics with their intervals, rows counted, and rows without a value."""
    names = list(next(iter(found.values())).metrics)
    width = max(map(len, found))
    lines = [
        f"{'':<{width}}  "
        + "".join(f"{name.replace('_', ' '):<25}" for name in names)
        + f"{'rows':>5}{'failed':>8}{'abstained':>11}"
    ]
    for judge, measured in found.items():
        cells = "".join(f"{measured.metrics[name]!s:<25}" for name in names)
        lines.append(f"{judge:<{width}}  {cells}{measured.rows:>5}{measured.failed:>8}{measured.abstained:>11}")
    return "\n".join(lines)
