"""Wake the subscriptions of this process after a change, and notify other processes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._message_tree import new_id
from .._notifications import encode_payloads
from .._sql import NOTIFY, json_array
from .._subscriptions import Subscriptions, wake_all
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .client import AsyncClient

logger = logging.getLogger("aibind_postgres")

# Cooldown: 30 times the shorter of the last two sends, so that one delayed send does not extend it.
COOLDOWN_FACTOR = 30
MIN_COOLDOWN, MAX_COOLDOWN = 0.005, 0.1  # seconds


class AsyncNotifier:
    """Sends notifications in the background, after the commit of the change.

    NOTIFY inside the transaction of an append would hold a server-wide lock while the commit is flushed.

    The first change after a cooldown is sent at once. Changes during a send and its cooldown are sent together, which
    limits the time spent on sending for any number of changes.

    If the client joins transactions of the caller, notifications are sent at once, in that transaction. PostgreSQL
    delivers them when it commits.
    """

    def __init__(self, client: AsyncClient, subscriptions: Subscriptions, channel: str) -> None:
        self.channel = channel
        self._client = client
        self._subscriptions = subscriptions
        self._instance = new_id()
        self._mutex = Mutex()
        self._pending: dict[str, None] = {}  # ids of changed streams, in order
        self._due = AsyncEvent()
        self._closing = AsyncEvent()
        self._worker: AsyncWorker | None = None

    @property
    def newest(self) -> int:
        """The number of the newest followed stream of this process."""
        return self._subscriptions.newest

    @property
    def sender(self) -> str:
        """The id of this store in payloads. A forked process has a different one."""
        return f"{self._instance}/{os.getpid()}"

    def wake(self, stream_ids: Collection[str]) -> None:
        """Wake the subscriptions of streams that this process may have changed."""
        wake_all(self._subscriptions.changed(stream_ids))

    async def changed(self, stream_ids: Collection[str]) -> None:
        """Wake the subscriptions of streams that this process has changed, and notify other processes."""
        self.wake(stream_ids)
        await self.notify(stream_ids)

    async def appended(self, appended: Collection[tuple[str, int, Sequence[str]]], newest: int) -> None:
        """Deliver texts that this process has appended, and notify other processes.

        Args:
            appended: Tuples of the stream id, the sequence number before the first text, and the texts.
            newest: The newest followed stream before the statement, as for `Subscriptions.appended`.
        """
        wake_all(self._subscriptions.appended(appended, newest))
        await self.notify([stream_id for stream_id, _, _ in appended])

    async def close(self) -> None:
        """Send the pending notifications and end the worker."""
        with self._mutex:
            self._closing.set()
            self._due.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def notify(self, stream_ids: Iterable[str]) -> None:
        """Send a notification, or queue it for the worker.

        If the client joins a transaction of the caller, errors propagate: a failed NOTIFY has aborted the change.
        Otherwise errors are ignored: other processes find the change by polling.
        """
        if self._client.joins_transactions:
            await self._send(stream_ids, None)
            return
        with self._mutex:
            if not self._pending:
                self._due.set()
            self._pending.update(dict.fromkeys(stream_ids))
            if self._worker is None or not self._worker.is_alive():
                with suppress(RuntimeError):  # no thread can start while the interpreter exits
                    self._worker = async_spawn(self._work, "aibind_postgres-notifier")

    async def _work(self) -> None:
        duration = math.inf
        while True:
            await self._due.wait(0 if self._closing.is_set() else WORKER_IDLE_TIMEOUT)
            with self._mutex:
                self._due.clear()
                batch, self._pending = self._pending, {}
                if not batch:
                    self._worker = None
                    return
            started = monotonic()
            try:
                await self._send(batch, self.sender)
            except Exception as error:
                logger.debug("notification for %d streams not sent: %s", len(batch), type(error).__name__)
            duration, previous_duration = monotonic() - started, duration
            cooldown = COOLDOWN_FACTOR * min(duration, previous_duration)
            await self._closing.wait(min(max(cooldown, MIN_COOLDOWN), MAX_COOLDOWN))

    async def _send(self, stream_ids: Iterable[str], sender: str | None) -> None:
        payloads = json_array(encode_payloads(stream_ids, sender))
        await self._client.query(NOTIFY, [self.channel, payloads])
