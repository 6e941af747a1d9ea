"""Signals that wait until a chunk is written and counted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class DeferredSignals:
    """Context manager that delays Ctrl-C, SIGTERM and SIGHUP until its block ends, or calls `interruptible`.

    A second signal acts at once, in case the block hangs. Ignored signals stay ignored.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending: int | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and self._pending is None:
            self._pending = number
        else:
            self._handlers[number](number, frame)

    def _act(self) -> None:
        number, self._pending = self._pending, None
        if number is not None:
            self._handlers[number](number, None)

    def __enter__(self) -> None:
        self._deferring = True

    def __exit__(self, *_: object) -> None:
        self._deferring = False
        self._act()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals act during a pause inside the block."""
        self._deferring = False
        try:
            self._act()
            yield
        finally:
            self._deferring = True
