"""SIGTERM and Ctrl-C as a wish to stop after the batch in hand."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType


class StopRequest:
    """Notes the first SIGTERM or SIGINT of a training run; ``received`` is None until then.

    A second SIGTERM changes nothing, a SIGINT after any first signal raises KeyboardInterrupt. A handler that stood
    before is not called: a parent's would end the process in the middle of a step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._says = False

    def listen(self, says: bool) -> None:
        """Take over both signals until the trainer restores its own; ``says`` has the first one acknowledged."""
        self.received, self._says = None, says
        if threading.current_thread() is not threading.main_thread():
            return  # Python hands signals to the main thread alone
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number)
        if self._says:
            text = f"{self.received.name}: stopping after the batch in hand, with a checkpoint; Ctrl-C stops at once\n"
            # Not print: the signal may have come in the middle of one. Nobody may be reading any more.
            with suppress(OSError):
                os.write(2, text.encode())
