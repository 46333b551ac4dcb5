"""Writing a model directory so that it is either complete and read back, or not there at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The same weights under the same arithmetic: nothing but the order of sums may differ, and on one machine nothing does.
RELOAD_TOLERANCE = 1e-5
PROBE_ROWS, PROBE_LENGTH = 2, 32
# A prime far from the usual multiples of vocabulary sizes, so that the probe visits distant rows of the embedding.
PROBE_STRIDE = 7919
# Room for the tokenizer, configuration and file system overhead beside the weights.
SPARE_BYTES = 32 * 2**20


def require_free_directory(out: Path) -> None:
    """Refuse to write where something is already.

    Raises:
        FileExistsError: if ``out`` is a file or a directory that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a non-empty directory" if out.is_dir() else "a file"
        raise FileExistsError(
            f"output {out} is already {what}; nothing was changed. Give a new directory, or remove this one first."
        )


def require_space(directory: Path, weights: int) -> None:
    """Raise ``OSError(ENOSPC)`` if the file system of ``directory`` cannot take ``weights`` bytes of weights."""
    free = shutil.disk_usage(directory).free
    if free < weights + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"not enough space: about {weights + SPARE_BYTES:,} bytes are needed and {free:,} are free; "
            "nothing was written. Free some space or give a directory on another disk",
            str(directory.parent),
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out``, renamed to ``out`` when the block ends well and removed when it does not.

    A process that is killed outright leaves ``.<name>.partial-*`` behind and never a half-written ``out``.

    Raises:
        FileExistsError: if ``out`` holds something already.
        OSError: if writing fails, also where the safetensors library reports it in its own way.
    """
    out = out.resolve()
    require_free_directory(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        yield staging
        _share(staging)
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    except SafetensorError as error:
        raise OSError(f"could not write the weights of {out}: {error}; nothing was kept") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _share(directory: Path) -> None:
    """Give every file the permissions of its directory: safetensors writes weights that only their owner can read."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.iterdir():
        path.chmod(mode)


def probe_logits(model: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits ``[2, T, V]`` of a causal LM (float32, on the CPU) on fixed token ids spread over its vocabulary.

    ``weights`` stand in for the parameters of those names. Runs without dropout, autocast, TF32 and gradients, and puts
    every module's training flag back. The weights must be whole, not sharded.
    """
    length = min(PROBE_LENGTH, getattr(model.config, "max_position_embeddings", PROBE_LENGTH))
    ids = (torch.arange(PROBE_ROWS * length) * PROBE_STRIDE + 1).remainder(model.config.vocab_size)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.view(PROBE_ROWS, length).to(device), "use_cache": False}
    modes = [(module, module.training) for module in model.modules()]
    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits = torch.func.functional_call(model, dict(weights or {}), kwargs=inputs).logits
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, mode in modes:
            module.training = mode
    return logits.float().cpu()


def logit_difference(expected: Tensor, got: Tensor) -> float:
    """Largest absolute difference, over the largest absolute expected logit where that exceeds one.

    NaN or infinite where either is: compare with ``not difference <= tolerance``.
    """
    assert expected.shape == got.shape, f"logits {tuple(got.shape)}, expected {tuple(expected.shape)}"
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1.0))


def require_reloaded(expected: Tensor, reloaded: Tensor) -> float:
    """The difference between the logits of what was written and of what was read back.

    Raises:
        ValueError: if they are not the same.
    """
    difference = logit_difference(expected, reloaded)
    if not difference <= RELOAD_TOLERANCE:
        raise ValueError(
            f"the directory reads back with logits that differ by {difference:.1e} of the largest, expected at most "
            f"{RELOAD_TOLERANCE:.0e}; nothing was kept"
        )
    return difference


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a tokenizer as it behaves now, read it back, and compare what a policy depends on.

    Raises:
        ValueError: naming the first thing that came back different.
    """
    from transformers import AutoTokenizer

    # save_pretrained leaves out the padding side of a tokenizer that was loaded without one.
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
    tokenizer.save_pretrained(directory)
    got = AutoTokenizer.from_pretrained(directory)
    text = "Name 3 primary colours.\n\n1. "
    pairs = {
        "vocabulary": (tokenizer.get_vocab(), got.get_vocab()),
        "chat template": (tokenizer.chat_template, got.chat_template),
        "end-of-sequence token": (tokenizer.eos_token, got.eos_token),
        "padding token": (tokenizer.pad_token, got.pad_token),
        "padding side": (tokenizer.padding_side, got.padding_side),
        "token ids of a text": (tokenizer(text)["input_ids"], got(text)["input_ids"]),
    }
    for what, (before, after) in pairs.items():
        if before != after:
            detail = "" if what == "vocabulary" else f": got {after!r:.60}, expected {before!r:.60}"
            raise ValueError(f"the saved tokenizer reads back with another {what}{detail}; nothing was kept")
