"""Requests to stop, from signals, that all ranks act on at the same point."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch

from qa_dist.reporting.run_directory import StoppedError
from qa_dist.training.engine import Engine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ECHO_SECONDS = 5.0
"""Signals this soon after the first are the same request again: a batch system signals the processes, and their
launcher passes on the one that it got itself."""


class StopRequest:
    """Remembers the first signal that asked this process to stop."""

    signal_number = 0
    """0 as long as there was none."""
    _noted_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first of `SIGNALS` instead of dying of it; a later one stops at once."""
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > ECHO_SECONDS:
            raise KeyboardInterrupt

    def raise_if_any(self, engine: Engine) -> None:
        """Raise `StoppedError` on all ranks if any of them was asked to stop. All ranks have to call this."""
        flag = torch.tensor(float(self.signal_number > 0), device=engine.device)
        if engine.sum(flag).item():
            raise self.error()

    def error(self) -> StoppedError:
        """What to raise once the ranks have agreed to stop."""
        number = self.signal_number
        reason = f"signal {number}" if number else "a signal to another process"
        return StoppedError(f"stopped by {reason}", 128 + (number or signal.SIGTERM))
