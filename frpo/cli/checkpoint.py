"""Finding a checkpoint and refusing a damaged or unsafe one before anything is built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from frpo.callbacks.checkpoint import latest
from frpo.cli.errors import ConfigError, nearest
from frpo.models.checkpoint import read_checkpoint

LAST = "last"
FOR_TRAINING = frozenset({"loops", "optimizer_states"})


def find_checkpoint(ckpt_path: str, folders: Iterable[Path]) -> Path:
    """Return the file that ``ckpt_path`` names; ``last`` is the newest whole checkpoint in ``folders``."""
    folders = list(dict.fromkeys(folders))
    if ckpt_path == LAST:
        found = next((path for path in map(latest, folders) if path is not None), None)
        if found is None:
            looked = " or ".join(str(folder) for folder in folders)
            raise ConfigError(
                f"ckpt_path: got 'last', but there is no whole checkpoint in {looked}; leave ckpt_path out to start "
                "from the beginning, or give the --name or --output_dir of the run to go on with"
            )
        return found
    path = Path(ckpt_path)
    if not path.exists():
        beside = sorted({str(file) for folder in (path.parent, *folders) for file in folder.glob("*.ckpt")})
        close = nearest(str(path), beside) or beside[:3]
        there = f"; there is {', '.join(close)}" if close else ""
        raise ConfigError(f"ckpt_path: no file {ckpt_path}, expected a checkpoint or 'last'{there}")
    return path


def check_checkpoint(path: Path, for_training: bool) -> None:
    """Raise :class:`ConfigError` unless ``path`` is a whole checkpoint that loads without running code.

    A directory is a sharded checkpoint and is left to its strategy.
    """
    if path.is_dir():
        return
    try:
        missing = FOR_TRAINING - set(read_checkpoint(path)) if for_training else set()
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"ckpt_path: {path}: {error}; use an earlier checkpoint of the run, or leave ckpt_path out"
        ) from error
    if missing:
        raise ConfigError(
            f"ckpt_path: {path} holds weights alone (no {', '.join(sorted(missing))}), expected a checkpoint that "
            "`frpo fit` wrote for going on; `frpo validate` takes it"
        )
