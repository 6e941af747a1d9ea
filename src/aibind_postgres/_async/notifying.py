"""Wake the subscriptions of this process after a change, and notify other processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._message_tree import new_id
from .._notifications import encode_payloads
from .._notify_pace import NotifyPace, NotifyTraffic
from .._sql import NOTIFY, json_array
from .._sqlstate import is_recoverable, sqlstate
from .._subscriptions import Subscriptions, wake_all
from ..metrics import STREAMS_NOTIFIED
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .._telemetry import StoreMetrics
    from .client import AsyncClient

logger = logging.getLogger("aibind_postgres.notifier")

BUSY_CONNECTIONS = 3
BUSY_TIMEOUT = 1.0  # seconds without a change after which a store is no longer busy


class AsyncNotifier:
    """Sends notifications in the background, after the commit of the change.

    NOTIFY inside the transaction of an append would hold a server-wide lock while the commit is flushed.

    The first change after a rest is sent at once. Changes during a send and the rest after it are sent together.
    `NotifyPace` decides how long to rest, and `NotifyTraffic` prolongs the rests in a fleet of many busy stores.

    If the client joins transactions of the caller, notifications are sent at once, in that transaction. PostgreSQL
    delivers them when it commits.

    Args:
        client: The client of the store.
        subscriptions: The subscriptions of the store.
        channel: The channel of the notifications.
        enabled: Whether to notify other processes.
        metrics: The metrics of the store, or None.
    """

    def __init__(
        self,
        client: AsyncClient,
        subscriptions: Subscriptions,
        channel: str,
        enabled: bool,
        metrics: StoreMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self.channel = channel
        self.traffic = NotifyTraffic()
        self._client = client
        self._enabled = enabled
        self._warned = False
        self._subscriptions = subscriptions
        self._instance = new_id()
        self._mutex = Mutex()
        self._pending: dict[str, None] = {}  # ids of changed streams, in order
        self._changes = 0  # of these streams
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
        if self._subscriptions.has_streams:
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

    async def notify(self, stream_ids: Collection[str]) -> None:
        """Send a notification, or queue it for the worker.

        In a transaction of the caller, errors propagate: a failed NOTIFY has aborted the change. Otherwise the change
        is durable, so errors are only logged: other processes find the change by polling.
        """
        if not self._enabled:
            return
        if self._client.joins_transactions:
            in_transaction = self._client.in_transaction()  # before the statement, which may lose the connection
            try:
                await self._send(stream_ids, None)
            except Exception as error:
                if in_transaction:
                    raise
                self._log_failure(error)
            return
        with self._mutex:
            if not self._pending:
                self._due.set()
            self._pending.update(dict.fromkeys(stream_ids))
            self._changes += 1
            if self._worker is None or not self._worker.is_alive():
                with suppress(RuntimeError):  # no thread can start while the interpreter exits
                    self._worker = async_spawn(self._work, "aibind_postgres-notifier")

    async def _work(self) -> None:
        pace = NotifyPace()
        while True:
            # A busy store uses one connection for notifications and one for each lane of appends.
            await self._client.keep(BUSY_CONNECTIONS)
            if not await self._due.wait(0 if self._closing.is_set() else BUSY_TIMEOUT):
                await self._client.keep(1)
                await self._due.wait(0 if self._closing.is_set() else WORKER_IDLE_TIMEOUT)
            with self._mutex:
                self._due.clear()
                batch, self._pending = self._pending, {}
                changes, self._changes = self._changes, 0
                if not batch:
                    self._worker = None
                    return
            started = monotonic()
            try:
                await self._send(batch, self.sender)
            except Exception as error:
                self._log_failure(error)
            now = monotonic()
            await self._closing.wait(max(pace.rest(now - started, changes), self.traffic.rest(now)))

    async def _send(self, stream_ids: Collection[str], sender: str | None) -> None:
        payloads = json_array(encode_payloads(stream_ids, sender))
        await self._client.query(NOTIFY, [self.channel, payloads])
        if self._metrics is not None:
            self._metrics.add(STREAMS_NOTIFIED, len(stream_ids))

    def _log_failure(self, error: Exception) -> None:
        """Warn once if the server refuses notifications. After a lost connection, the next one may be sent."""
        refused = sqlstate(error) is not None and not is_recoverable(error)
        level = logging.WARNING if refused and not self._warned else logging.DEBUG
        self._warned = self._warned or level == logging.WARNING
        logger.log(
            level,
            "notifications cannot be sent: %s %s. Changes are stored, and readers in other processes find them by "
            "polling. Check that the role may execute pg_notify and that the notification queue is not full, or pass "
            "notify=False",
            type(error).__name__,
            sqlstate(error) or "",
        )
