"""Ctrl-C and SIGTERM: an orderly end within moments, and a word that nothing is lost.

Whatever is on the disk is whole at any moment, so that an end that takes too long (a step on a
device, a read from a slow disk) may be cut short.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

KEPT = "Interrupted. Finished work is kept: the same command goes on from there."
SECONDS = 2.0  # that an orderly end may take
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """What was asked for.

    Attributes:
        code: the exit code: 128 and the signal's number.
        told: whether a person has been told already.
    """

    def __init__(self) -> None:
        self.code = 128 + signal.SIGINT
        self.told = False
        self._asked = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear both signals for the block; outside the main thread, whoever has it hears them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            if not self._asked:  # else a second one may still come
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        """The first signal ends the work in order, a second one at once."""
        self.code = 128 + number
        if self._asked:
            self._end()
        self._asked = True
        timer = threading.Timer(SECONDS, self._end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    def _end(self) -> None:
        """End this process and all that it has started."""
        import psutil

        sys.stdout.flush()
        if not self.told:
            os.write(2, f"\ncrane: {KEPT}\n".encode())
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(self.code)
