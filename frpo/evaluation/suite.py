"""A suite: which prompts, how they are answered, and what measures the answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers import PreTrainedTokenizerBase

from frpo.data.prompts.batch import EncodedPrompt, encode
from frpo.data.prompts.sources import PromptSource
from frpo.rewards.base import Reward
from frpo.rollouts.in_process import InProcessSampler
from frpo.rollouts.sampler import Sampler

log = logging.getLogger(__name__)

KL = "kl"
"""Prefix of the KL's quantities; no score may have this name."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
GREEDY_TOKENS = 512


class Suite:
    """Prompts answered by the policy, and what measures the answers.

    Prompts and sampling noise are the same at every evaluation: the noise of a completion is a function of ``seed``
    and the prompt's place alone, so two checkpoints are compared in pairs.

    Args:
        prompts: what is asked.
        scores: what judges the completions, by the name its results go by.
        sampler: how completions are drawn; null takes the most probable tokens, at most 512.
        samples: completions per prompt; more than 1 need a sampler with a temperature above 0.
        kl_to: by name, directory or hub id of a frozen model with the policy's vocabulary. The exact KL of the policy
            to it is measured along the policy's own completions (see :mod:`frpo.evaluation.kl`).
        batch_size: prompts answered at once on each device, and sequences in one forward pass of the KL.
        max_prompt_length: tokens, chat template included; longer prompts are left out and counted.
        seed: of the sampling noise.
    """

    def __init__(
        self,
        prompts: PromptSource,
        scores: dict[str, Reward],
        sampler: Sampler | None = None,
        samples: int = 1,
        kl_to: dict[str, str] | None = None,
        batch_size: int = 8,
        max_prompt_length: int = 1024,
        seed: int = 0,
    ) -> None:
        sampler = InProcessSampler(max_new_tokens=GREEDY_TOKENS, temperature=0.0) if sampler is None else sampler
        least = {"samples": (samples, 1), "batch_size": (batch_size, 1), "max_prompt_length": (max_prompt_length, 1)}
        for name, (value, smallest) in {**least, "seed": (seed, 0)}.items():
            if value < smallest:
                raise ValueError(f"Suite.{name}: got {value}, expected at least {smallest}")
        if samples > 1 and sampler.temperature == 0:
            raise ValueError(
                f"Suite.samples: got {samples} with a sampler of temperature 0, whose completions of a prompt are all "
                "equal; write samples: 1, or give the suite a sampler with temperature 1.0"
            )
        if not scores and not kl_to:
            raise ValueError("Suite: got no scores and no kl_to, so nothing would be measured; give at least one")
        for name in (*scores, *(kl_to or {})):
            check_name("Suite: score or kl_to", name)
        if KL in scores:
            raise ValueError(f"Suite.scores: {KL!r} is the name of the KL's own results; choose another")
        self.prompts, self.scores, self.sampler, self.samples = prompts, scores, sampler, samples
        self.kl_to = {} if kl_to is None else kl_to
        self.batch_size, self.max_prompt_length, self.seed = batch_size, max_prompt_length, seed

    @property
    def quantities(self) -> list[str]:
        """What every completion is measured by: scores, then ``kl/<name>/sequence`` and ``kl/<name>/token``."""
        return [*self.scores, *(f"{KL}/{name}/{part}" for name in self.kl_to for part in ("sequence", "token"))]

    def load(self, name: str, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
        """Read and tokenize the prompts; ``name`` is what messages call the suite.

        Raises:
            ValueError: no prompt is short enough, or a task no score takes.
            FileNotFoundError: a source's file is not there.
        """
        with naming(name):
            rows = encode(self.prompts.prompts(), tokenizer)
            kept = [row for row in rows if len(row.ids) <= self.max_prompt_length]
            if len(kept) < len(rows):
                self._report_long(name, rows, kept)
            tasks = {row.prompt.task for row in kept}
            for reward in self.scores.values():
                reward.check_tasks(tasks)
        return kept

    def check_positions(self, name: str, rows: list[EncodedPrompt], positions: int | None) -> None:
        """Raise ``ValueError`` where a prompt and its completion can be longer than the model has ``positions`` for."""
        longest = max(len(row.ids) for row in rows)
        total = longest + self.sampler.max_new_tokens
        if positions is not None and total > positions:
            raise ValueError(
                f"suite {name!r}: the longest prompt has {longest} tokens, with max_new_tokens "
                f"{self.sampler.max_new_tokens} that makes {total}, but the policy has positions for {positions}; "
                "lower max_prompt_length, or give the suite a sampler with fewer max_new_tokens"
            )

    def _report_long(self, name: str, rows: list[EncodedPrompt], kept: list[EncodedPrompt]) -> None:
        lengths = [len(row.ids) for row in rows]
        found = (
            f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than max_prompt_length="
            f"{self.max_prompt_length} tokens, the longest has {max(lengths)}"
        )
        if not kept:
            raise ValueError(f"{found}, the shortest {min(lengths)}: none is left; raise max_prompt_length")
        _warn("suite %r: %s; they are left out", name, found)


@rank_zero_only
def _warn(message: str, *arguments: object) -> None:
    log.warning(message, *arguments)


def check_name(what: str, name: str) -> None:
    """Raise ``ValueError`` unless ``name`` can stand in a file's name and between the slashes of a metric's."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{what}: got the name {name!r}, expected letters, digits, '_', '-' and '.', as it becomes part of file "
            "names and metrics"
        )


@contextmanager
def naming(suite: str) -> Iterator[None]:
    """Say in an error of a suite which one it is."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"suite {suite!r}: {error}") from error
