"""Ctrl-C and SIGTERM while a model is trained: the step is finished, the run saved and ended.

May import: the standard library and what stands above `train`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from lvr_lite.errors import signal_name

# Seconds within which a second signal is the first one's: a launcher of several processes passes on
# what the terminal has sent to each of them already.
SAME_SIGNAL = 5.0


class StopRequest:
    """A block in which the first signal is noted, in `signal`, and the second one does what it
    would do without the block. Handlers that were there come back at its end.

    signal: the number of the first signal; 0 as long as there is none.

    Only a program's main thread can set handlers: in another one, signals do what they always do.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._earlier: dict[int, Any] = {}
        self._since = 0.0
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Who started this process may have switched a signal off, as `nohup` does.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._earlier[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if not self.signal:
            self.signal = number
            self._since = time.monotonic()
            self._say(number)
        elif "WORLD_SIZE" not in os.environ or time.monotonic() - self._since > SAME_SIGNAL:
            self.__exit__(None, None, None)
            signal.raise_signal(number)

    def _say(self, number: int) -> None:
        """Not with `print`: the signal may have come in the middle of another one."""
        if os.environ.get("RANK", "0") == "0" and os.getpid() == self._process:
            line = f"{signal_name(number)}: the run ends after this step; once more ends it now\n"
            os.write(2, line.encode())


def begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    """Called in each process that prepares batches. Ctrl-C, which a terminal sends to them too,
    must not end one before the step is finished; SIGTERM does, by which the trainer ends them.

    begin: what transformers calls there; None for nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if begin is not None:
        begin(worker)
