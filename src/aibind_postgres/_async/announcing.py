"""Telling other processes which streams have changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._sql import ANNOUNCE, announcements, json_array
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .changes import AsyncChanges

logger = logging.getLogger("aibind_postgres")

REST = 30  # after an announcement the worker rests for so many times as long as it took, it or the one before
SHORTEST_REST, LONGEST_REST = 0.005, 0.1  # seconds


class AsyncAnnouncer:
    """Announces after the fact and in the background.

    The first change after a rest is announced at once. What changes while an announcement is under way, and in the rest
    after it, goes out together: so announcing takes a small part of the time, however many changes there are, and what
    it takes from the writers stays small on a busy server too. A client whose statements belong to a transaction of the
    caller announces at once instead: PostgreSQL delivers that when the transaction commits.
    """

    def __init__(self, changes: AsyncChanges) -> None:
        self._changes = changes
        self._client = changes.database.client
        self._mutex = Mutex()
        self._pending: dict[str, None] = {}
        self._filled = AsyncEvent()
        self._closing = AsyncEvent()
        self._worker: AsyncWorker | None = None

    async def announce(self, stream_ids: Iterable[str]) -> None:
        """Announce that these streams have changed.

        Raises nothing, since what is not announced is found by polling; but in a transaction of the caller an error has
        undone what was to be announced, and is raised.
        """
        if self._client.joins_transactions:
            await self._send(stream_ids, None)
            return
        with self._mutex:
            if not self._pending:
                self._filled.set()
            self._pending.update(dict.fromkeys(stream_ids))
            if self._worker is None or not self._worker.is_alive():
                with suppress(RuntimeError):  # no thread to be had, as when the interpreter ends
                    self._worker = async_spawn(self._work, "aibind_postgres-announcer")

    async def close(self) -> None:
        """Send what is left and end the worker."""
        with self._mutex:
            self._closing.set()
            self._filled.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _work(self) -> None:
        taken = math.inf
        while True:
            await self._filled.wait(0 if self._closing.is_set() else WORKER_IDLE_TIMEOUT)
            with self._mutex:
                self._filled.clear()
                batch, self._pending = self._pending, {}
                if not batch:
                    self._worker = None
                    return
            began = monotonic()
            try:
                await self._send(batch, self._changes.name)
            except Exception as error:
                logger.debug("an announcement was not sent: %s", type(error).__name__)
            taken, taken_before = monotonic() - began, taken
            rest = REST * min(taken, taken_before)  # one that was held up by chance does not count
            await self._closing.wait(min(max(rest, SHORTEST_REST), LONGEST_REST))

    async def _send(self, stream_ids: Iterable[str], sender: str | None) -> None:
        payloads = json_array(announcements(stream_ids, sender))
        await self._client.query(ANNOUNCE, [self._changes.channel, payloads])
