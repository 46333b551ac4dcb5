"""A moderation service as a judge of harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from frpo.rewards.base import JudgeIdentity, Reward
from frpo.rewards.judges.asking import MalformedAnswerError, NoAnswer
from frpo.rewards.judges.chat import asked
from frpo.rewards.judges.client import Endpoint
from frpo.types import Completion, Judgement


class Moderation(Reward):
    """The largest category score of an OpenAI-compatible ``/moderations`` endpoint, in [0, 1]: a score of harm.

    ``components`` holds the score of each category. Half of the published reward of harmful prompts (arXiv 2602.08813).

    Args:
        endpoint: the server and the model.
        include_prompt: moderate the user's message and the completion together, not the completion alone.
    """

    def __init__(self, endpoint: Endpoint, include_prompt: bool = False) -> None:
        self.endpoint = endpoint
        self.include_prompt = include_prompt

    def setup(self, device: torch.device) -> None:
        """Check the key and open the cache; the model is the server's."""
        self.endpoint.setup()

    def identity(self) -> JudgeIdentity:
        """The moderation model; there is no template."""
        return JudgeIdentity(self.endpoint.model, self.endpoint.revision)

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion; all are sent at once, within the endpoint's concurrency."""
        bodies = [{"model": self.endpoint.model, "input": self._input(completion)} for completion in completions]
        results = self.endpoint.ask("/moderations", bodies, largest_score)
        return [Judgement.failed(f"moderation: {r.reason}") if isinstance(r, NoAnswer) else r for r in results]

    def _input(self, completion: Completion) -> str:
        return f"{asked(completion, None)}\n\n{completion.text}" if self.include_prompt else completion.text


def largest_score(body: Any) -> Judgement:
    """The largest of ``results[0].category_scores``.

    Raises:
        MalformedAnswerError: there is not one result, or a score is no number in [0, 1].
    """
    try:
        (result,) = body["results"]
        scores = dict(result["category_scores"])
    except (LookupError, TypeError, ValueError) as error:
        raise MalformedAnswerError("expected one result with category_scores") from error
    scores = {name: score for name, score in scores.items() if score is not None}  # null: the model does not judge it
    for name, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0.0 <= score <= 1.0:  # nor a NaN
            raise MalformedAnswerError(f"category {name!r} has no score in [0, 1]")
    if not scores:
        raise MalformedAnswerError("no category_scores")
    components = {str(name): float(score) for name, score in scores.items()}
    return Judgement.of(max(components.values()), components)
