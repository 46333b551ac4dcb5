"""A byte-level tokenizer and a tiny random Llama to judge with: every space counts, digits are tokens of their own."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from frpo.types import Completion, Prompt

CPU = torch.device("cpu")
SPECIALS = ["<pad>", "<bos>", "<eos>"]
MERGES = [("Y", "e"), ("Ye", "s"), ("N", "o"), ("y", "e"), ("ye", "s"), ("n", "o"), ("Ġ", "yes")]


def byte_tokenizer(without: str = "") -> Any:
    """One token a byte, and those of ``MERGES``; texts begin with <bos>. ``without``: characters it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    merges = [(left, right) for left, right in MERGES if not set(left + right) & set(without)]
    vocabulary = {piece: i for i, piece in enumerate(SPECIALS + pieces + [a + b for a, b in merges])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def save_judge(path: Any, tokenizer: Any) -> Any:
    """A random Llama of two layers that reads the end of its text, in a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def completion(text: str, prompt: str = "How?", **fields: Any) -> Completion:
    row = Prompt(id="0", messages=({"role": "user", "content": prompt},), task="t", fields=fields)
    return Completion(prompt=row, prompt_text=f"<user> {prompt}", text=text)


@cache
def loaded(path: Any) -> tuple[Any, Any]:
    """Tokenizer and model of a directory."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    return AutoTokenizer.from_pretrained(path), LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def next_logits(path: Any, text: str) -> list[float]:
    """Next-token logits behind ``text``, <bos> before it, from one pass of its own."""
    tokenizer, model = loaded(path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].tolist()


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]
