"""Fuzzing: how many examples, how long each may take, and bytes and values that have broken readers before."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

T = TypeVar("T")
SECONDS = 10.0
"""Of CPU time, for one example: the slowest takes a tenth."""

TOKENS: tuple[bytes, ...] = (
    *(b"\0", b"\x01", b"\x1b[2J", b"\t", b"\r", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xfe\xff", b"\xc3"),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b": ", b"- ", b"\n", b"#", b"|\n", b">\n", b"? ", b"%", b"@", b"`"),
    *(b"&a ", b"*a", b"&a [*a]", b"<<: *a\n", b"!!int x", b"!!timestamp x", b"!!python/object/apply:os.system [id]"),
    *(b"${", b"}", b"${oc.env:FRPO_NOT_THERE}", b"${name}", b"${model}", b"${..name}", b"${${name}}", b"???"),
    *(b"9" * 5000, b"1e999", b".nan", b"-0", b"0b_", b"0x_", b"1_0", b"NaN", b"Infinity", b"\\ud800", b"[" * 2000),
    *(b"null", b"true", b"include: [.]\n", b"class_path: os.system\n", b"init_args: []\n", "\u202e\u200b".encode()),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**63, 10**400, 1.5, float("inf"), float("nan"), "", " ", "x", "\0", "\ud800", "???"),
    *("${name}", "${", "${oc.env:FRPO_NOT_THERE}", "${nothing}", "${model.init_args}", "${oc.create:{a: 1}}"),
    *("os.system", "builtins.eval", "..", ".", "a.b.c", "frpo", "frpo.objectives.GRPO", "torch.nn.Linear", "x" * 5000),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}}, {1: 2}, {None: 1}, {"class_path": "os.system"}),
    *({"class_path": None}, {"class_path": ""}, {"class_path": []}, {"init_args": 1}, {"class_path": "builtins.eval"}),
    {"class_path": "os.system", "init_args": {"command": "touch PWNED"}},
    {"class_path": "frpo.objectives.FRPO", "init_args": {"lam": "x"}, "beside": 1},
)


class TooSlowError(BaseException):
    """Raised by the alarm; no handler of the code under test catches it."""


def fuzzed(examples: int) -> settings:
    """``examples`` of them, the same in every run; FRPO_FUZZ_EXAMPLES=N makes it N that differ from run to run."""
    given = os.environ.get("FRPO_FUZZ_EXAMPLES")
    return settings(
        max_examples=int(given) if given else examples,
        derandomize=given is None,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """Raise :class:`TooSlowError` inside the block once it has taken more CPU time."""

    def ring(*_: object) -> None:
        raise TooSlowError(f"took over {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(call: Callable[[], T], refusals: type[Exception] | tuple[type[Exception], ...], names: str) -> T | str:
    """What ``call`` returns, or the message of its refusal, which must name ``names``; anything else is a failure."""
    with within():
        try:
            return call()
        except refusals as error:
            kind, message = type(error).__name__, str(error)
    assert names in message, f"{kind} does not name {names!r}: {message[:300]}"
    assert len(message) < 20_000, f"a message of {len(message)} characters"
    message.encode()
    return message


def damaged(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one to four changes: bytes flipped, cut, doubled, swapped, or a token put in."""
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.randint(0, len(data)) for _ in range(2))
        kind = draw.randint(0, 6)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << draw.randint(0, 7))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:end] + data[at : at + min(end - at, 4096)] + data[end:]
        elif kind == 4:
            data = data[:at] + draw.randbytes(draw.randint(1, 8)) + data[at:]
        else:
            data = data[:at] + draw.choice(TOKENS) + data[at:]
    return data


def mutated(tree: Any, draw: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A copy of ``tree`` with one to three of its parts deleted, renamed, replaced, wrapped or put elsewhere."""
    for _ in range(draw.randint(1, 3)):
        tree = _changed(tree, draw, values, depth=draw.randint(0, 7))
    return tree


def _changed(tree: Any, draw: random.Random, values: tuple[Any, ...], depth: int) -> Any:
    if depth and tree and isinstance(tree, dict):
        key = draw.choice(list(tree))
        return {**tree, key: _changed(tree[key], draw, values, depth - 1)}
    if depth and tree and isinstance(tree, list):
        index = draw.randrange(len(tree))
        return [*tree[:index], _changed(tree[index], draw, values, depth - 1), *tree[index + 1 :]]
    kind = draw.randint(0, 5)
    if kind == 0 and isinstance(tree, dict) and tree:
        dropped = draw.choice(list(tree))
        return {key: value for key, value in tree.items() if key != dropped}
    if kind == 1 and isinstance(tree, dict) and tree:
        renamed = draw.choice(list(tree))
        return {(str(key)[::-1] if key == renamed else key): value for key, value in tree.items()}
    if kind == 2 and isinstance(tree, dict):
        return {**tree, draw.choice(("class_path", "init_args", "extra", "name", "")): draw.choice(values)}
    if kind == 3:
        return draw.choice(([tree], {"class_path": tree}, {"init_args": tree}, [tree, tree], {"a": tree}))
    return draw.choice(values)


randoms = st.randoms(use_true_random=False)
