"""Mathematical answers compared by equivalence. Nothing a completion says is evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from queue import LifoQueue

import torch

from frpo.foundation import require
from frpo.rewards import maths_worker
from frpo.rewards.answers import MAX_CHARACTERS, ExactAnswer, Extractor, plain_number
from frpo.types import Completion, Judgement

_Pair = tuple[str, str]


class MathAnswer(ExactAnswer):
    r"""``correct`` where the final answer is equivalent to the row's, ``wrong`` where not, ``missing`` where none is.

    As :class:`~frpo.rewards.answers.ExactAnswer`, which see for ``field``, ``extract`` and the three values, but
    beyond equal numbers and equal text the ``math-verify`` library decides, on LaTeX: ``\frac{x+1}{2}`` is
    ``\frac{1}{2}+\frac{x}{2}``, ``2,1`` is ``\{1,2\}``, ``x=5`` is ``5``. Integers are settled without it, and answers
    over 1000 characters by their text alone. An answer it cannot read is wrong unless the text is equal. Needs
    ``pip install 'frpo[maths]'``.

    It runs in processes of its own, started at the first answer that needs it, with a limit on processor time and
    memory; no text is evaluated, compiled or run there. An answer over the time limit is a failed judgement, not a
    wrong one, and counts against the cap on failures: raise ``timeout`` where honest answers reach it. Each such
    answer costs its time limit and a new process, about two seconds more.

    Args:
        field: of the row, holding the right answer; a row without it abstains.
        extract: tried in order; null tries Boxed, Hashes, LastNumber.
        correct: value of an equivalent answer.
        wrong: of another.
        missing: where no extractor finds an answer.
        timeout: seconds of processor time an answer may take.
        memory: MiB of address space of a process.
        workers: processes.
    """

    def __init__(
        self,
        field: str = "answer",
        extract: list[Extractor] | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
        missing: float = 0.0,
        timeout: float = 3.0,
        memory: int = 1024,
        workers: int = 2,
    ) -> None:
        super().__init__(field, extract, correct, wrong, missing)
        self.timeout = require.number("MathAnswer.timeout", timeout, above=0)
        self.memory = require.number("MathAnswer.memory", memory, at_least=512, hint="in MiB; the library takes half")
        self.workers = require.number("MathAnswer.workers", workers, at_least=1)
        self._idle: LifoQueue[_Worker] | None = None

    def setup(self, device: torch.device) -> None:
        """Raise ``ImportError`` where the extra is not installed."""
        if find_spec("math_verify") is None:
            raise ImportError("MathAnswer compares answers with the package math-verify: pip install 'frpo[maths]'")

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion; equal pairs of answers are compared once."""
        settled = [self.settle(completion) for completion in completions]
        pairs = list(dict.fromkeys(pair for pair in settled if not isinstance(pair, Judgement)))
        compared = dict(zip(pairs, self._compare(pairs), strict=True))
        return [found if isinstance(found, Judgement) else compared[found] for found in settled]

    def judge(self, completion: Completion) -> Judgement:
        """Judge one completion."""
        return self([completion])[0]

    def settle(self, completion: Completion) -> Judgement | _Pair:
        """As :class:`~frpo.rewards.answers.ExactAnswer`; integers and answers that are too long are settled too."""
        settled = super().settle(completion)
        if isinstance(settled, Judgement):
            return settled
        integers = all(number is not None and number.denominator == 1 for number in map(plain_number, settled))
        return Judgement.of(self.wrong) if integers or max(map(len, settled)) > MAX_CHARACTERS else settled

    def _compare(self, pairs: list[_Pair]) -> list[Judgement]:
        if not pairs:
            return []
        if self._idle is None:
            self.setup(torch.device("cpu"))
            self._idle = LifoQueue()
            for _ in range(self.workers):
                self._idle.put(_Worker(self.timeout, self.memory))
        with ThreadPoolExecutor(min(self.workers, len(pairs))) as threads:
            return list(threads.map(self._ask, pairs))

    def _ask(self, pair: _Pair) -> Judgement:
        assert self._idle is not None
        worker = self._idle.get()
        try:
            verdict = worker.compare(*pair)
        finally:
            self._idle.put(worker)
        if verdict not in (maths_worker.EQUAL, maths_worker.DIFFERENT):
            return Judgement.failed(f"the answer could not be compared: {verdict}")
        return Judgement.of(self.correct if verdict == maths_worker.EQUAL else self.wrong)


class _Worker:
    """One process, started when first asked and again after it was ended."""

    def __init__(self, timeout: float, memory: int) -> None:
        self.timeout = timeout
        self.memory = memory
        self._process: subprocess.Popen[str] | None = None

    def compare(self, gold: str, answer: str) -> str:
        """The worker's verdict, or what ended it."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([gold, answer]) + "\n")
            process.stdin.flush()
            verdict = process.stdout.readline().strip()
        except BrokenPipeError:
            verdict = ""
        if verdict:
            return verdict
        self._process = None
        status = process.wait()
        if -status in (signal.SIGPROF, signal.SIGALRM):
            return f"it took over {self.timeout:g} s"
        return f"the process ended with status {status}"

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-B", "-m", maths_worker.__name__, str(self.timeout), str(self.memory)]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LC_ALL": "C.UTF-8"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        weakref.finalize(self, _end, process, os.getpid())
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"MathAnswer: the process that compares answers did not start: {process.stderr.read()}")
        self._process = process
        return process


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the run ends, not the run
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        with suppress(BrokenPipeError):  # what it was never asked is still in the buffer
            if stream is not None:
                stream.close()
