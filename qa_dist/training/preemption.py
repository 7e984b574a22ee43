"""Requests to stop, from signals, that all ranks act on at the same step."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal that asked this process to stop."""

    signal_number = 0
    """0 as long as there was none."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT, SIGTERM or SIGUSR1 instead of dying of it; a second one stops at once."""
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
