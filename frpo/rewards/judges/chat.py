"""Judges that are asked in a chat and answer in words."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from frpo.foundation import require
from frpo.rewards.base import JudgeIdentity, Reward
from frpo.rewards.judges.asking import MalformedAnswerError, NoAnswer
from frpo.rewards.judges.client import Endpoint
from frpo.types import Completion, Judgement

_CONTROL = re.compile(
    r"<(?=[|\uff5c][^|\uff5c\s<>]{1,40}[|\uff5c]>|/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)>|</?SYS>>)|\[(?=/?INST\])"
)
_DECORATION = " \t\r\n*_`'\"<>.:"  # what models put around a one-word answer


class ChatJudge(Reward):
    """Asks a chat model one question per completion, at temperature 0, and reads the answer strictly.

    The tokens of common chat templates (``<|im_end|>``, ``[INST]``) spelled out in prompt or completion are broken up
    by a space. A judge that words persuade is still persuaded by them.

    Subclasses say what is asked (``system``, ``user``) and how an answer is read (:meth:`read`). Only the judge's
    answer is read, never the completion. A judge that gives no answer, or one that does not follow the
    format, is a failed judgement. Calls are concurrent, see :class:`~frpo.rewards.judges.client.Endpoint`.

    Args:
        endpoint: the server and the model.
        max_tokens: of an answer; null: ``answer_tokens``, which is enough for what the judge is asked.
        seed: sent along, for servers that know it; null sends none.
        prompt_field: field of the data row with what is really asked, where the prompt dresses it up; null: the last
            message of the user.
        options: further fields of the request, which also override those above; null leaves a field out, as in
            ``{max_tokens: null, max_completion_tokens: 512}``.
    """

    system: str
    user: str
    places: tuple[str, str]
    """The placeholders of ``user`` for the question and for the completion."""
    answer_tokens: int

    def __init__(
        self,
        endpoint: Endpoint,
        max_tokens: int | None = None,
        seed: int | None = 0,
        prompt_field: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.endpoint = endpoint
        require.number(f"{type(self).__name__}.max_tokens", max_tokens, at_least=1)
        self.max_tokens = self.answer_tokens if max_tokens is None else max_tokens
        self.seed = seed
        self.prompt_field = prompt_field
        self.options = options or {}
        if "messages" in self.options or "model" in self.options:
            raise ValueError(
                f"{type(self).__name__}.options: got {sorted(self.options)}, expected neither `messages`, which is the "
                "judge's question, nor `model`, which stands in the endpoint"
            )

    @abstractmethod
    def read(self, answer: str) -> Judgement:
        """The judgement in the judge's ``answer``; raises ``MalformedAnswerError`` where there is not exactly one."""

    def setup(self, device: torch.device) -> None:
        """Check the key and open the cache; the model is the server's."""
        self.endpoint.setup()

    def identity(self) -> JudgeIdentity:
        """The judge model and a hash of its question."""
        return JudgeIdentity.asking(self.endpoint.model, self.endpoint.revision, f"{self.system}\0{self.user}")

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion; all questions are asked at once, within the endpoint's concurrency."""
        bodies = [self._body(completion) for completion in completions]
        results = self.endpoint.ask("/chat/completions", bodies, lambda body: self.read(chat_text(body)))
        return [Judgement.failed(f"judge: {r.reason}") if isinstance(r, NoAnswer) else r for r in results]

    def _body(self, completion: Completion) -> dict[str, Any]:
        texts = map(without_control, (asked(completion, self.prompt_field), completion.text))
        user = filled(self.user, dict(zip(self.places, texts, strict=True)))
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": user}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            **self.options,
        }
        return {name: value for name, value in body.items() if value is not None}


def without_control(text: str) -> str:
    """``text`` with the tokens of common chat templates broken up: some servers read them inside a message, too."""
    return _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def filled(template: str, texts: Mapping[str, str]) -> str:
    """``template`` with each ``{name}`` of ``texts`` replaced, in one pass: braces in the texts mean nothing."""
    names = "|".join(re.escape(name) for name in texts)
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)


def asked(completion: Completion, prompt_field: str | None) -> str:
    """What the completion answers: the row's ``prompt_field``, or the last message of the user.

    Raises:
        ValueError: the row has neither.
    """
    if prompt_field is not None:
        if not isinstance(completion.prompt.fields.get(prompt_field), str):
            raise ValueError(
                f"prompt_field: got {prompt_field!r}, expected a field that holds text in every row; that of prompt "
                f"id={completion.prompt.id!r} has {sorted(completion.prompt.fields)}"
            )
        return completion.prompt.fields[prompt_field]
    for message in reversed(completion.prompt.messages):
        if message["role"] == "user":
            return message["content"]
    raise ValueError(f"judge: prompt id={completion.prompt.id!r} has no message of a user, expected one to judge by")


def chat_text(body: Any) -> str:
    """The text of the one choice of a chat completion.

    Raises:
        MalformedAnswerError: there is none, or it is blank.
    """
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"]
    except (LookupError, TypeError) as error:
        raise MalformedAnswerError("no choices[0].message.content") from error
    if not isinstance(content, str) or not content.strip():
        raise MalformedAnswerError(f"no text, finish_reason={choice.get('finish_reason')!r:.60}")
    return content


def only_word(answer: str) -> str:
    """The answer in lower case without quotes, asterisks or a full stop around it."""
    return answer.strip(_DECORATION).lower()
