"""``frpo export``: the policy of a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from frpo.foundation.errors import ConfigError
from frpo.models.checkpoint import load_policy
from frpo.models.export import DTYPES, export_policy
from frpo.models.saving import require_free_directory


def main(args: list[str]) -> int:
    """Export: ``frpo export --ckpt_path FILE --out DIR [--merge]``."""
    parser = argparse.ArgumentParser(
        prog="frpo export",
        description="Write the policy of a checkpoint as a Hugging Face directory. An adapter gives a PEFT directory, "
        "or with --merge a model. The directory appears once it was read back and gave the same logits.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="the checkpoint of a run")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must be new or empty")
    parser.add_argument("--config", type=Path, help="the run's config.yaml, in place of what the checkpoint holds")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights: a model of its own")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the stored weights; by default the type they have")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run modelling code that comes with the policy's base model"
    )
    options = parser.parse_args(args)
    try:
        require_free_directory(options.out)
        loaded = load_policy(options.ckpt_path, options.config, options.trust_remote_code)
        report = export_policy(
            loaded.model,
            loaded.policy.tokenizer,
            options.out,
            merge=options.merge,
            dtype=options.dtype,
            checkpoint=options.ckpt_path.name,
            step=loaded.step,
            trust_remote_code=options.trust_remote_code,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    print(
        f"saved {report.directory}: {report.kind}, {report.parameters:,} parameters in {report.dtype}, "
        f"{report.size / 1e6:.1f} MB; reads back the same, {report.rounding:.1e} from the logits of the policy"
    )
    return 0
