"""The policy: a description that costs nothing to read, and the causal language model it loads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from frpo.foundation import require
from frpo.models.loading import reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter (arXiv 2106.09685) on the linear layers named.

    Args:
        r: rank.
        alpha: the update is scaled by alpha / r.
        target_modules: names of linear layers, or ``all-linear``.
        path: a PEFT adapter directory to start from, instead of a fresh adapter; its own rank then holds.
        dropout: share of the adapter's inputs left out in training, in [0, 1). For supervised fine-tuning alone: policy
            optimisation samples from and trains one policy, and refuses it.
    """

    r: int = 16
    alpha: int = 32
    target_modules: list[str] | str = "all-linear"
    path: str | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require.number("LoRA.r", self.r, at_least=1)
        require.number("LoRA.alpha", self.alpha, above=0)
        require.number("LoRA.dropout", self.dropout, at_least=0, below=1, hint="it is a share, as 0.05")

    def attach(self, model: Any, revision: str | None, task_type: str = "CAUSAL_LM") -> Any:
        """Wrap ``model`` in a PeftModel whose adapter alone is trainable; with ``SEQ_CLS`` its head is too.

        ``revision`` is that of ``model``, kept in the adapter's description.
        """
        import peft

        config = self.peft_config(task_type)
        model.requires_grad_(False)
        if self.path is None:
            adapted = peft.get_peft_model(model, config)
        else:
            with reading(self.path, "adapter that fits"):
                adapted = peft.PeftModel.from_pretrained(model, self.path, is_trainable=True, config=config)
        # PEFT does not take over the revision of the base, and an adapter would then name its newest.
        adapted.active_peft_config.revision = revision
        return adapted

    def peft_config(self, task_type: str) -> Any:
        """The adapter as PEFT describes it, with this ``dropout``.

        Raises:
            FileNotFoundError: ``path`` is no adapter directory.
            ValueError: its description cannot be read.
        """
        import peft

        if self.path is None:
            return peft.LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=self.target_modules,
                task_type=task_type,
            )
        if not (Path(self.path) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"LoRA.path: got {self.path!r}, expected a PEFT adapter directory (adapter_config.json and "
                "adapter_model.safetensors), as `frpo export` writes it"
            )
        with reading(self.path, "description of an adapter"):
            config = peft.PeftConfig.from_pretrained(self.path)
        config.lora_dropout = self.dropout  # not the one it was trained with before
        return config


class Policy:
    """Any Hugging Face causal language model, trained in full or through an adapter.

    Args:
        path: a directory with a model and its tokenizer, or a hub id.
        adapter: a :class:`LoRA`, or null to train every weight.
        dtype: of the weights: float32, bfloat16, float16, float64. An adapter's own are float32 or wider.
        revision: of the hub repository.
        pad_token: for a tokenizer without one: a token of its vocabulary, ``<unk>`` or the end-of-sequence token say.
        chat_template: a Jinja template, or the path of one, in place of the tokenizer's own.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: run modelling code that comes with the weights. Off unless you trust its author.
        attn_implementation: passed to transformers (``sdpa``, ``eager``, ``flash_attention_2``); null lets it choose.
        tokenizer_path: directory or hub id of the tokenizer where the model's own has none; ``revision`` is not its.
    """

    def __init__(
        self,
        path: str,
        adapter: LoRA | None = None,
        dtype: str = "float32",
        revision: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        tokenizer_path: str | None = None,
    ) -> None:
        self.path, self.adapter, self.revision = path, adapter, revision
        self.dtype = require.one_of("Policy.dtype", dtype, DTYPES)
        self.pad_token, self.chat_template = pad_token, chat_template
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code, self.attn_implementation = trust_remote_code, attn_implementation
        self.tokenizer_path = tokenizer_path

    def description(self) -> dict[str, Any]:
        """``class_path`` and ``init_args`` as plain data: what a checkpoint keeps to build the policy again."""
        names = list(inspect.signature(type(self)).parameters)
        init_args = {name: getattr(self, name) for name in names}
        if self.adapter is not None:
            init_args["adapter"] = asdict(self.adapter)
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": init_args}

    def prepare(self) -> None:
        """Make the files that ``path`` names exist; here they do, or the hub has them."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left; it must have an end-of-sequence and a padding token."""
        path, revision, argument = self.path, self.revision, "path"
        if self.tokenizer_path is not None:
            path, revision, argument = self.tokenizer_path, None, "tokenizer_path"
        with finding(path, "tokenizer", "a tokenizer", argument):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=self.trust_remote_code)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {path!r} has no end-of-sequence token, so a completion could never end; set "
                "`eos_token` in its tokenizer_config.json"
            )
        self._set_pad_token(tokenizer, path)
        tokenizer.padding_side = "left"
        if self.chat_template is not None:
            file = Path(self.chat_template)
            is_file = len(self.chat_template) < 1024 and "{" not in self.chat_template
            if is_file and not file.is_file():
                raise FileNotFoundError(
                    f"Policy.chat_template: got {self.chat_template!r}, expected a Jinja template or the path of one"
                )
            tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else self.chat_template
        return tokenizer

    def _set_pad_token(self, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
        if self.pad_token is not None:
            if self.pad_token not in tokenizer.get_vocab():
                raise ValueError(
                    f"Policy.pad_token: got {self.pad_token!r}, which is not in the vocabulary of {path!r}; name "
                    'a token that is, such as "<unk>" or the end-of-sequence token'
                )
            tokenizer.pad_token = self.pad_token
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {path!r} has no padding token, which batches are filled with; name one by "
                'policy.init_args.pad_token ("<unk>" or the end-of-sequence token will do), or set `pad_token` in its '
                "tokenizer_config.json"
            )

    def load(self) -> Any:
        """The model in train mode, its adapter attached; without one all weights train.

        Every dropout is 0 but for the adapter's own.
        """
        model = self.load_base()
        return self.ready(model if self.adapter is None else self.adapter.attach(model, self.revision))

    def ready(self, model: Any) -> Any:
        """``model`` in train mode, recomputing activations where that is asked for."""
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.adapter is not None:
                model.enable_input_require_grads()
        return model.train()

    def load_base(self, path: str | None = None) -> Any:
        """The model without an adapter, dropout at 0; from ``path`` where it is given, else the policy's own."""
        path = self.path if path is None else path
        with finding(path, "causal language model", "a causal language model in safetensors"):
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES[self.dtype],
                revision=self.revision if path == self.path else None,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                attn_implementation=self.attn_implementation,
            )
        disable_dropout(model)
        return model

    def read_config(self, path: str | None = None) -> PretrainedConfig:
        """The configuration of the model of :meth:`load_base`; no weights are read."""
        path = self.path if path is None else path
        revision = self.revision if path == self.path else None
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=self.trust_remote_code)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: on-policy ratios are 1 only if sampling and training see one policy."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that train; a tied weight is named once."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def finding(path: str, what: str, expected: str, argument: str = "path") -> Iterator[None]:
    """As :func:`~frpo.models.loading.reading`; the ``ValueError`` names the policy's argument and what to write."""
    try:
        with reading(path, what):
            yield
    except (OSError, ValueError) as error:
        where = "a directory here" if Path(path).exists() else "neither a directory here nor a hub id that answers"
        raise ValueError(
            f"Policy.{argument}: got {path!r} ({where}), expected {expected}. Write a directory, a hub id, or import a "
            "model without a hub: `frpo import-model smollm2-135m-instruct --out DIR`. "
            f"Cause: {str(error).splitlines()[0]}"
        ) from error
