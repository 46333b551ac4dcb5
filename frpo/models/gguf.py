"""Reading a GGUF file into an ordinary float32 model and its tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
GPT2_SPLITS = {"gpt-2", "gpt2", "default"}


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, every weight unpacked to float32, and its tokenizer, padding on the left.

    A tokenizer without a padding token pads with its end-of-sequence token.

    Raises:
        ValueError: if the file is damaged, lacks weights, or has no end-of-sequence token.
    """
    rule = _split_rule(path)
    model = _load_model(path)
    tokenizer = _without_strays(_load_tokenizer(path, rule), model.config.vocab_size)
    if tokenizer.eos_token is None:
        raise ValueError(f"{path.name} names no end-of-sequence token, so a completion could never end")
    if tokenizer.pad_token is None:
        log.warning("%s names no padding token; padding with %r", path.name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _split_rule(path: Path) -> str | None:
    """The file's ``tokenizer.ggml.pre``: how text is cut before the byte-pair merges."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    except Exception as error:  # on a damaged file the reader raises whatever numpy does
        raise ValueError(f"{path.name} is not a readable GGUF file ({error}); download it again") from error
    return None if field is None else str(field.contents())


def _load_model(path: Path) -> PreTrainedModel:
    import transformers

    # Newer versions can keep the weights in their quantised blocks, where they cannot be trained or saved.
    unpack = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **options
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{path.name} lacks {len(missing)} weights of its model, among them {missing[:3]}")
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    packed = {name for name, p in model.named_parameters() if p.dtype != torch.float32}
    assert not packed, f"still quantised: {sorted(packed)[:3]}"
    return model


def _load_tokenizer(path: Path, rule: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    backend = tokenizer.backend_tokenizer
    if rule == "smollm":
        backend.pre_tokenizer = smollm_split()
    elif rule is not None and rule not in GPT2_SPLITS and "use_regex=True" in repr(backend.pre_tokenizer):
        log.warning("%s cuts text by rule %r, read here with GPT-2's: some token ids may differ", path.name, rule)
    return tokenizer


def _without_strays(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """The tokenizer without tokens that the model has no embedding for.

    transformers 5 adds ``<|endoftext|>`` to every byte-level vocabulary, also where the file has no such token.
    """
    from tokenizers import Tokenizer

    if len(tokenizer) <= size:
        return tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < size]
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )


def smollm_split() -> PreTokenizer:
    r"""Every digit alone, then GPT-2's rule, as SmolLM's merges were learned.

    transformers 5 reads these files with GPT-2's rule only, which cuts white space before a digit differently:
    ``"\n\n3"`` becomes three tokens where the model was trained on two.
    """
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
