"""Reading model directories that others wrote: whatever is broken in one is said of it by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from frpo.foundation import require


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Within, what a broken file of ``path`` raises becomes a ``ValueError`` that names ``path``; OSErrors stay.

    The libraries that read tokenizers and weights raise what their parsers do: KeyError, SafetensorError, a bare
    Exception.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        # torch's allocator of the CPU has no error of its own.
        if (isinstance(error, ValueError) and path in str(error)) or "allocate memory" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path!r} holds no {what} that can be read ({type(error).__name__}: {reason:.300}); write or download "
            "it again"
        ) from error


def require_positions(name: str, max_length: int, config: Any, path: str) -> None:
    """Refuse the argument ``name`` where the model of ``config`` at ``path`` has fewer positions than it says."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise require.refusal(name, max_length, f"at most the {positions} positions of {path!r}")
