"""Rewards made of rewards. The parts stay visible, by name, in ``Judgement.components``."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from frpo.foundation import require
from frpo.foundation.errors import suggestion
from frpo.rewards.base import Reward
from frpo.rewards.calls import call_each, call_reward
from frpo.types import Completion, Judgement


class Composite(Reward):
    """Named parts, each asked once about the whole batch, and one way to combine their values.

    A failed part fails the whole, and the reason names it. An abstaining part is left out; where all abstain, the
    whole abstains. Components of a part that is itself composed are named ``part/component``.
    """

    def __init__(self, rewards: dict[str, Reward]) -> None:
        require.non_empty(f"{type(self).__name__}.rewards", rewards, "name a reward")
        for name in rewards:
            if not name or "/" in name:
                raise ValueError(
                    f"{type(self).__name__}.rewards: got the name {name!r}; a name must not be blank nor hold a "
                    "'/', which joins the names of nested parts"
                )
        self.rewards = rewards

    def parts(self) -> Mapping[str, Reward]:
        """The named rewards."""
        return self.rewards

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion by every part and combine."""
        parts = call_each({name: (reward, completions) for name, reward in self.rewards.items()})
        return [
            self._judge({name: judgements[i] for name, judgements in parts.items()}) for i in range(len(completions))
        ]

    @abstractmethod
    def combine(self, values: Mapping[str, float]) -> float | None:
        """The reward from the values of the parts that did not abstain; None to abstain."""

    def _judge(self, parts: Mapping[str, Judgement]) -> Judgement:
        values = {name: part.value for name, part in parts.items() if part.status == "value"}
        components = {}
        for name, part in parts.items():
            if part.status == "value":
                components[name] = part.value
            components.update({f"{name}/{sub}": value for sub, value in part.components.items()})
        failed = [f"{name}: {part.reason}" for name, part in parts.items() if part.status == "failed"]
        if failed:
            return Judgement("failed", reason="; ".join(failed), components=components)
        combined = self.combine(values) if values else None
        if combined is None:
            reasons = "; ".join(f"{n}: {part.reason}" for n, part in parts.items() if part.status == "abstain")
            return Judgement("abstain", reason=reasons, components=components)
        if not math.isfinite(combined):
            return Judgement("failed", reason=f"the parts combine to {combined}", components=components)
        return Judgement.of(combined, components)


class WeightedSum(Composite):
    """``sum_k w_k r_k``: the usual way to make a graded reward out of two-valued ones.

    With two values FRPO has nothing to add over GRPO; a sum of a few rules has many. Where parts abstain, the
    weights of the others are scaled up to the same total, so that the reward keeps its scale. A weight of 0 keeps a
    part in the completion table without scoring it; for a penalty, give the part a negative value.

    Example: ``WeightedSum({"refuses": RefusalPhrases(), "short": Length(high=60)}, {"refuses": 0.7, "short": 0.3})``.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        super().__init__(rewards)
        for name in weights:
            if name not in rewards:
                near = suggestion(name, rewards)
                raise ValueError(f"WeightedSum.weights: got a weight for {name!r}, which is no reward here{near}")
        missing = sorted(set(rewards) - set(weights))
        if missing:
            raise ValueError(
                f"WeightedSum.weights: got none for {missing}, expected one for each reward: write "
                f"`{missing[0]}: 1.0` under weights, or 0.0 to only record it"
            )
        why = "weights are scaled up where a part abstains: give a penalty negative values instead, as `refused: -1.0`"
        for name, weight in weights.items():
            require.number(f"WeightedSum.weights.{name}", weight, at_least=0, hint=why)
        self.weights = weights
        self.total = sum(weights.values())
        if self.total == 0:
            raise ValueError("WeightedSum.weights: got 0 for every reward, expected at least one above 0")

    def combine(self, values: Mapping[str, float]) -> float | None:
        """Sum over the parts present, scaled to the total weight; None where they weigh nothing."""
        present = sum(self.weights[name] for name in values)
        if present == 0:
            return None
        return sum(self.weights[name] * value for name, value in values.items()) * (self.total / present)


class Product(Composite):
    """``prod_k r_k``: a part in [0, 1] acts as a gate on the others, graded if it is.

    Example: helpfulness that a refusal cuts to a third:
    ``Product({"answers": RefusalPhrases(refused=0.3, complied=1.0), "quality": WeightedSum(...)})``.
    """

    def combine(self, values: Mapping[str, float]) -> float | None:
        """Product over the parts present."""
        return math.prod(values.values())


class Complement(Reward):
    """``1 - r``: a score of harm in [0, 1] as a reward for harmlessness, or a success rate as a refusal rate.

    What fails or abstains stays so, and the components stay those of ``reward``.

    Example: the published reward of harmful prompts (arXiv 2602.08813) is the complement of a ``WeightedSum`` of a
    StrongREJECT judge and a moderation score, 0.5 each.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def parts(self) -> Mapping[str, Reward]:
        """The one reward."""
        return {"of": self.reward}

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion and turn the value round."""
        return [
            Judgement.of(1.0 - judgement.value, judgement.components) if judgement.status == "value" else judgement
            for judgement in call_reward(self.reward, completions)
        ]
