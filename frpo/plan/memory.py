"""Amounts of memory: as written, as shown, and as the machine has them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

UNITS = {"b": 1, **{f"{letter}{suffix}": base ** (power + 1) for power, letter in enumerate("kmgt")
                    for suffix, base in (("ib", 1024), ("b", 1000), ("", 1024))}}  # fmt: skip
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container says what it may take."""

MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""With this variable set (262144, say) glibc gives every large block back as soon as it is freed, not some of them."""


def parse_bytes(text: str) -> int:
    """``24GiB``, ``24G`` (the same), ``24GB`` (10^9) or a number of bytes. Raises ``ValueError`` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (found[2] or "b").lower() if found else ""
    if found is None or unit not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"--memory: got {text!r}, expected an amount such as 24GiB, 80GB or 512MiB")
    return int(float(found[1]) * UNITS[unit])


def show_bytes(number: int) -> str:
    """In GiB, MiB or KiB with three digits or so."""
    for unit, divisor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(number) >= divisor:
            return f"{number / divisor:.{2 if number < 100 * divisor else 0}f} {unit}"
    return f"{number} B"


def available(*, gpu: bool) -> int | None:
    """Bytes of the smallest GPU here, or of this machine or its container; None for a GPU where there is none."""
    if gpu:
        cards = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return min(cards, default=None)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in LIMITS:
        text = file.read_text(encoding="ascii").strip() if file.is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)
