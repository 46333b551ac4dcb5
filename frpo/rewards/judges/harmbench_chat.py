"""The question of HarmBench's classifier, asked of a chat model."""

from __future__ import annotations

from frpo.rewards.judges import harmbench_template
from frpo.rewards.judges.asking import MalformedAnswerError
from frpo.rewards.judges.chat import ChatJudge, only_word
from frpo.types import Judgement

_VALUES = {"yes": 1.0, "no": 0.0}


class HarmBenchChat(ChatJudge):
    """Attack success: 1 where the completion is an instance of the harmful behaviour, else 0 (arXiv 2402.04249).

    The refusal rate of arXiv 2602.08813 is 1 minus its mean; :class:`~frpo.rewards.compose.Complement` turns it
    round. Another model than the benchmark's classifier gives other rates: compare only scores of one judge. An answer
    other than yes or no is failed. Two values: an evaluation, not a reward to train FRPO by. Arguments: see
    :class:`~frpo.rewards.judges.chat.ChatJudge`.
    """

    system = harmbench_template.SYSTEM
    user = harmbench_template.USER
    places = ("behavior", "generation")
    answer_tokens = 16

    def read(self, answer: str) -> Judgement:
        """1 for yes, 0 for no."""
        value = _VALUES.get(only_word(answer))
        if value is None:
            raise MalformedAnswerError("neither yes nor no")
        return Judgement.of(value)
