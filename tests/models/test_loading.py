"""What is said of a model directory that cannot be read, and what is not said of it."""

from __future__ import annotations

import pytest
import torch

from frpo.models.loading import reading


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OSError("no such file"),
    ],
)
def test_a_full_memory_or_disk_is_not_a_broken_model(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reading("my/model", "causal language model"):
        raise error
    assert raised.value is error


def test_what_a_parser_raises_names_the_directory() -> None:
    said = "'my/model' holds no tokenizer that can be read \\(KeyError: 'vocab'\\)"
    with pytest.raises(ValueError, match=said), reading("my/model", "tokenizer"):
        raise KeyError("vocab")
