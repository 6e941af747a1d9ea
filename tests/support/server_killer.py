"""Kills and restarts a server while clients use it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sized
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.servers import Server

EXTRA_KILLS = 20  # maximum number of additional kills if none has interrupted a call yet

HANG = 90  # seconds without progress on a running server after which a client counts as hanging


class ServerKiller:
    """A thread that kills and restarts a server repeatedly.

    Between two kills and after the last one, it waits until every client makes progress. Each kill therefore
    interrupts all clients, and a failure names the clients that did not recover.

    Args:
        server: The server to kill.
        times: The minimum number of kills. If no call was lost, at most `EXTRA_KILLS` more follow.
        logs: The completed work of each client, by the client's name.
        losses: The calls that failed because of a kill.
        seed: The seed of the random pauses.
    """

    def __init__(self, server: Server, times: int, logs: Mapping[str, Sized], losses: Sized, seed: int) -> None:
        self.kills = 0
        self._server = server
        self._times = times
        self._logs = logs
        self._losses = losses
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._cancelled = False
        self._error: BaseException | None = None
        print(f"the seed of the kills is {seed}")

    @property
    def is_done(self) -> bool:
        """Whether all kills are done, or the thread has failed."""
        return not self._thread.is_alive()

    def __enter__(self) -> ServerKiller:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._cancelled = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._wait_for_progress()
            while self._needs_more_kills() and not self._cancelled:
                time.sleep(self._random.uniform(0, 0.4))
                self._server.kill()
                self.kills += 1
                time.sleep(self._random.uniform(0, 0.3))
                self._server.start()
                self._wait_for_progress()
        except BaseException as error:
            print(f"{error!r}")  # at once, since the clients may never end
            self._error = error

    def _needs_more_kills(self) -> bool:
        return self.kills < self._times + (0 if self._losses else EXTRA_KILLS)

    def _wait_for_progress(self) -> None:
        before = {name: len(log) for name, log in self._logs.items()}
        deadline = time.monotonic() + HANG
        while waiting := [name for name, log in self._logs.items() if len(log) == before[name]]:
            if self._cancelled:
                return
            assert time.monotonic() < deadline, f"no progress after {self.kills} kills: {waiting}"
            time.sleep(0.02)
