"""Finding a checkpoint and refusing a damaged or unsafe one before anything is built."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from frpo.foundation.errors import ConfigError, nearest
from frpo.models.checkpoint import read_checkpoint
from frpo.run.checkpoint_files import is_whole, newest_first

LAST = "last"
FOR_TRAINING = frozenset({"loops", "optimizer_states"})


def find_checkpoint(ckpt_path: str, folders: Iterable[Path]) -> Path:
    """Return the file that ``ckpt_path`` names; ``last`` is the newest whole checkpoint in ``folders``.

    A newer one that is damaged is passed over with a warning.
    """
    folders = list(dict.fromkeys(folders))
    if ckpt_path == LAST:
        return _last(folders)
    path = Path(ckpt_path)
    if not path.exists():
        beside = sorted({str(file) for folder in (path.parent, *folders) for file in folder.glob("*.ckpt")})
        close = nearest(str(path), beside) or beside[:3]
        there = f"; there is {', '.join(close)}" if close else ""
        raise ConfigError(f"ckpt_path: no file {ckpt_path}, expected a checkpoint or 'last'{there}")
    return path


def _last(folders: list[Path]) -> Path:
    for folder in folders:
        damaged: list[Path] = []
        for file in newest_first(folder):
            if is_whole(file):
                if damaged:
                    _warn(f"{described(damaged)} is damaged; using the one before it, {described([file])}")
                return file
            damaged.append(file)
    looked = " or ".join(str(folder) for folder in folders)
    damaged = [file for folder in folders for file in newest_first(folder)]
    found = f" ({', '.join(file.name for file in damaged)}: damaged)" if damaged else ""
    raise ConfigError(
        f"ckpt_path: got 'last', but there is no whole checkpoint in {looked}{found}; leave ckpt_path out to start "
        "from the beginning, or give the --name or --output_dir of the run to go on with"
    )


def described(files: list[Path]) -> str:
    """Checkpoints by name, each with its step where that can be told: ``a/last.ckpt (step 6)``."""
    return " and ".join(f"{file} (step {'unknown' if (step := _step(file)) is None else step})" for file in files)


def _step(file: Path) -> int | None:
    # The name is there even where the content is damaged; last.ckpt is a second name of such a file.
    for name in [file, *sorted(file.parent.glob("step=*.ckpt"))]:
        numbered = re.fullmatch(r"step=(\d+)\.ckpt", name.name)
        if numbered and name.samefile(file):
            return int(numbered[1])
    return int(read_checkpoint(file)["global_step"]) if file.is_file() and is_whole(file) else None


@rank_zero_only
def _warn(text: str) -> None:
    print(f"frpo: warning: {text}", file=sys.stderr)


def check_checkpoint(path: Path, for_training: bool) -> None:
    """Raise :class:`ConfigError` unless ``path`` is a whole checkpoint that loads without running code."""
    if path.is_file() and not is_whole(path):
        raise ConfigError(
            f"ckpt_path: {path} is damaged: it was cut short, or its bytes do not fit their checksums; use an earlier "
            "checkpoint of the run, or leave ckpt_path out"
        )
    try:
        held = read_checkpoint(path).keys()
        missing = FOR_TRAINING - held if for_training else set()
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"ckpt_path: {path}: {error}; use an earlier checkpoint of the run, or leave ckpt_path out"
        ) from error
    if missing:
        raise ConfigError(
            f"ckpt_path: {path} holds weights alone (no {', '.join(sorted(missing))}), expected a checkpoint that "
            "`frpo fit` wrote for going on; `frpo validate` takes it"
        )
