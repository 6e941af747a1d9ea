"""A server that is killed again and again while others work on it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sized
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.servers import Server

MORE = 20  # kills at most, where none has hit a call yet: with a few, that is a matter of chance

HANG = 90  # seconds without any progress, on a server that is up, that are taken for a hang


class Killing:
    """Kills a server `times` times, and on until a call was lost, in a thread of its own; starts it again each time.

    `logs` have the names of those who work, and what each of them has got done. Between two kills, and after the last
    one, all of them have to get on: so each kill interrupts everybody, and who does not recover is named.
    """

    def __init__(self, server: Server, times: int, logs: Mapping[str, Sized], losses: Sized, seed: int) -> None:
        self.kills = 0
        self._server = server
        self._times = times
        self._logs = logs
        self._losses = losses
        self._chance = random.Random(seed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._given_up = False
        self._problem: BaseException | None = None
        print(f"the seed of the kills is {seed}")

    @property
    def over(self) -> bool:
        """Whether the last kill has been survived, or will not be."""
        return not self._thread.is_alive()

    def __enter__(self) -> Killing:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._given_up = True
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        try:
            self._see_progress()
            while self._has_to_go_on() and not self._given_up:
                time.sleep(self._chance.uniform(0, 0.4))
                self._server.kill()
                self.kills += 1
                time.sleep(self._chance.uniform(0, 0.3))
                self._server.start()
                self._see_progress()
        except BaseException as problem:
            print(f"{problem!r}")  # now: the workers may never end
            self._problem = problem

    def _has_to_go_on(self) -> bool:
        return self.kills < self._times + (0 if self._losses else MORE)

    def _see_progress(self) -> None:
        before = {name: len(log) for name, log in self._logs.items()}
        deadline = time.monotonic() + HANG
        while waiting := [name for name, log in self._logs.items() if len(log) == before[name]]:
            if self._given_up:
                return
            assert time.monotonic() < deadline, f"after {self.kills} kills these do not get on: {waiting}"
            time.sleep(0.02)
