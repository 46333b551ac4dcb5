"""The tiny policy: a Llama of about 120 thousand parameters that knows the tiny world, made on the spot."""

from __future__ import annotations

import hashlib
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from frpo.foundation import require
from frpo.models.policy import LoRA, Policy
from frpo.tiny.corpus import pretraining_rows, vocabulary

BATCH_SIZE = 64
LEARNING_RATE = 8e-3
BETAS = (0.9, 0.95)
WARMUP_STEPS = 30
MAX_GRAD_NORM = 1.0
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class TinyPolicy(Policy):
    """A policy that is pre-trained on the tiny world where it is first needed, and read from the cache afterwards.

    Args:
        seed: of the weights and of the corpus.
        steps: of pre-training, 64 rows each; 450 take some 20 seconds on one CPU thread, and under about 300 the
            policy does not know its facts.
        cache_dir: the files lie here, in a folder named after all that they depend on: the settings, the code of the
            tiny world, and the versions of torch and transformers.
        adapter: as in :class:`~frpo.models.policy.Policy`.
        dtype: as in :class:`~frpo.models.policy.Policy`.
    """

    def __init__(
        self,
        seed: int = 0,
        steps: int = 450,
        cache_dir: str = ".cache/tiny",
        adapter: LoRA | None = None,
        dtype: str = "float32",
    ) -> None:
        require.number("TinyPolicy.steps", steps, at_least=1, hint="leave it out for a policy worth training")
        require.seed("TinyPolicy.seed", seed)
        super().__init__(str(Path(cache_dir) / _fingerprint(seed, steps)), adapter=adapter, dtype=dtype)
        self.seed, self.steps, self.cache_dir = seed, steps, cache_dir

    def prepare(self) -> None:
        """Pre-train unless the cache has it. Processes may do so at once: whole folders appear, and the first stays."""
        target = Path(self.path)
        if target.is_dir():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            made = Path(folder) / "policy"
            pretrain(made, seed=self.seed, steps=self.steps)
            _move(made, target)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the tiny world; it needs no pre-training."""
        return build_tokenizer()

    def load_base(self, path: str | None = None) -> nn.Module:
        """The model without an adapter, pre-trained first where it is not in the cache yet."""
        if path is None:
            self.prepare()
        return super().load_base(path)

    def read_config(self, path: str | None = None) -> PretrainedConfig:
        """See :class:`~frpo.models.policy.Policy`; it needs no pre-training."""
        return _config(build_tokenizer()) if path is None else super().read_config(path)


def pretrain(out_dir: str | Path, seed: int, steps: int) -> float:
    """Pre-train the tiny policy into a Hugging Face directory; returns the last step's loss in nats per token.

    Next-token loss on question and answer, AdamW, cosine decay after a short warm-up. It runs on one CPU thread, and
    the same arguments give the same bytes on one machine. The global random state and the number of threads are left
    as they were.
    """
    print(f"tiny policy: pre-training {steps} steps of {BATCH_SIZE} rows (seed {seed})", file=sys.stderr)
    tokenizer = build_tokenizer()
    with _one_thread_seeded(seed):
        model = LlamaForCausalLM(_config(tokenizer))
        corpus = encode_corpus(tokenizer, seed=seed, rows=steps * BATCH_SIZE)
        loss = _train(model, corpus, steps=steps, pad=tokenizer.pad_token_id)
    if not math.isfinite(loss):
        raise RuntimeError(f"tiny policy: pre-training ended with loss {loss}, expected a finite number")
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    print(f"tiny policy: final loss {loss:.3f} nats per token", file=sys.stderr)
    return loss


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the tiny world, the special tokens first; padding on the left."""
    ids = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        padding_side="left",
        model_max_length=64,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_corpus(tokenizer: PreTrainedTokenizerFast, *, seed: int, rows: int) -> Tensor:
    """The pre-training corpus as int64 [rows, L], padded on the right: what the chat template gives, row by row."""
    ids, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    texts = (f"<user> {asked} <assistant> {said} <eos>" for asked, said in pretraining_rows(seed, rows))
    encoded = [[ids[word] for word in text.split()] for text in texts]
    longest = max(map(len, encoded))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in encoded])


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def _train(model: nn.Module, corpus: Tensor, *, steps: int, pad: int) -> float:
    """Fit the model to the corpus in its order, once; padding is out of the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    loss = torch.tensor(math.nan)
    model.train()
    for step, rows in enumerate(corpus.split(BATCH_SIZE)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * _lr_factor(step, steps)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    model.eval()
    return loss.item()


def _lr_factor(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def _one_thread_seeded(seed: int) -> Iterator[None]:
    """One CPU thread and the CPU generator at ``seed`` inside, both as before outside; other devices are left alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _fingerprint(seed: int, steps: int) -> str:
    """A name for all that the files depend on: settings, code of the tiny world, versions."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(f"{seed} {steps} {torch.__version__} {transformers.__version__}".encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _move(made: Path, target: Path) -> None:
    """Give a finished folder its name; where another process was first, its folder stays."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
