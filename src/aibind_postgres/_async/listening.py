"""Wakes subscriptions when other processes change streams: by notifications, with a poll as the fallback."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._notifications import decode_payload, encode_payloads
from .._sql import NOTIFY, json_array
from .._subscriptions import Subscriptions, wake_all
from .._tables import quote
from .connections import UnansweredError, execute, is_direct
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .client import AsyncClient
    from .connections import Row
    from .database import AsyncDatabase
    from .notifying import AsyncNotifier

logger = logging.getLogger("aibind_postgres")

ANSWER_TIMEOUT = 5.0  # seconds for an answer on the listening connection
MAX_SILENCE = (
    3.0  # seconds without a sign of life from it, after which a change that only the poll found starts a probe
)
PROBE_TIMEOUT = 2.0  # seconds in which a probe must arrive
MAX_POLL_FACTOR = 10  # times poll_interval: the longest pause of a poll that finds nothing
MAX_POLL_RETRY = 5.0  # seconds between two polls that fail
MIN_RECONNECT, MAX_RECONNECT = 0.1, 30.0  # seconds between two attempts to connect, doubled each time


class AsyncListener:
    """The worker that wakes the subscriptions of one store.

    It starts with the first subscription that waits, and ends when there have been none for a while.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        subscriptions: Subscriptions,
        notifier: AsyncNotifier,
        poll_statement: str,
        poll_interval: float,
    ) -> None:
        self._database = database
        self._client = database.client
        self._subscriptions = subscriptions
        self._notifier = notifier
        self._poll_statement = poll_statement
        self._poll_interval = poll_interval
        self._mutex = Mutex()
        self._worker: AsyncWorker | None = None
        self._connection: AsyncListenConnection | None = None
        self._warned = False

    def ensure_running(self) -> None:
        """Start the worker if it does not run; called after a subscription is registered."""
        if not self._is_running():
            with self._mutex:
                if not self._is_running() and not self._database.closing.is_set():
                    # The connection also tells the current worker from one that is about to end.
                    connection = AsyncListenConnection(self._client, self._notifier, self._database.closing)
                    self._connection = connection
                    self._worker = async_spawn(partial(self._run, connection), "aibind_postgres-listener")

    def _is_running(self) -> bool:
        worker = self._worker  # which another thread may remove
        return worker is not None and worker.is_alive()

    async def close(self) -> None:
        """End the worker."""
        with self._mutex:
            worker, connection = self._worker, self._connection
        if connection is not None:
            connection.interrupt()
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _run(self, connection: AsyncListenConnection) -> None:
        pause = self._poll_interval
        awaited_at = polled_at = monotonic()
        try:
            while not self._database.closing.is_set():
                if self._subscriptions.awaited():
                    awaited_at = monotonic()
                elif monotonic() - awaited_at > WORKER_IDLE_TIMEOUT and self._ends_idle():
                    return
                if await connection.connect_if_due():
                    wake_all(self._subscriptions.changed(None))  # notifications may have been missed
                try:
                    await self._receive(connection, min(pause, WORKER_IDLE_TIMEOUT))
                    if monotonic() - polled_at < pause:
                        continue
                    polled_at = monotonic()
                    if found := await self._poll(connection):
                        await connection.probe_if_silent()
                except Exception as error:
                    if self._database.closing.is_set():
                        return
                    # The readers run their own statements, and raise where the caller sees it.
                    logger.debug("listening or polling failed: %s", type(error).__name__)
                    await connection.disconnect_if_broken(error)
                    pause = min(pause * 2, max(MAX_POLL_RETRY, self._poll_interval))
                    wake_all(self._subscriptions.changed(None))
                else:
                    longest = MAX_POLL_FACTOR * self._poll_interval
                    pause = self._poll_interval if found else min(pause * 1.5, longest)
        finally:
            with self._mutex:
                if self._connection is connection:
                    self._worker = self._connection = None
            wake_all(self._subscriptions.changed(None))  # a reader that still waits starts another worker
            await connection.disconnect()

    def _ends_idle(self) -> bool:
        """Return whether the worker ends, since nobody waits."""
        with self._mutex:
            worker, self._worker = self._worker, None
        # A subscription that waits from here on finds no worker, and starts one.
        if not self._subscriptions.awaited():
            return True
        with self._mutex:
            another = self._worker is not None
            self._worker = self._worker or worker
        return another

    async def _receive(self, connection: AsyncListenConnection, timeout: float) -> None:
        if not connection.is_connected:
            await self._database.closing.wait(min(timeout, connection.seconds_until_due))
            return
        async for payload in connection.notifications(timeout):
            wake_all(self._subscriptions.changed(decode_payload(payload, self._notifier.sender)))
        if await connection.is_unavailable() and not self._warned:
            self._warned = True
            logger.warning(
                "notifications unavailable: LISTEN receives nothing on this connection, as behind a transaction "
                "pooler. Readers are woken by polling instead, every %g to %g seconds",
                self._poll_interval,
                MAX_POLL_FACTOR * self._poll_interval,
            )

    async def _poll(self, connection: AsyncListenConnection) -> bool:
        """Read the states of the awaited streams; return whether this woke anyone."""
        streams = self._subscriptions.awaited()
        if not streams:
            return False
        params = [json_array({stream.id for stream in streams})]
        if connection.is_connected and self._client.joins_transactions:
            # Not in the caller's transaction, which belongs to another thread.
            rows = await connection.query(self._poll_statement, *params)
        else:
            # Through the client, so that the poll has the search_path, role and rights of the readers.
            rows = await self._client.query(self._poll_statement, params)
        woken = self._subscriptions.polled(streams, {stream_id: (state, total) for stream_id, state, total in rows})
        wake_all(woken)
        return bool(woken)


class AsyncListenConnection:
    """The connection that LISTENs, opened again whenever it is lost."""

    def __init__(self, client: AsyncClient, notifier: AsyncNotifier, closing: AsyncEvent) -> None:
        self._client = client
        self._notifier = notifier
        self._closing = closing
        self._mutex = Mutex()
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self._direct = False  # connected to a server process, not to a pooler
        self._probed_at = math.inf  # when a probe was sent that has not arrived
        self._active_at = 0.0  # the last sign of life
        self._due_at = 0.0  # of the next attempt to connect
        self._reconnect_pause = MIN_RECONNECT

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def seconds_until_due(self) -> float:
        """Seconds until the next attempt to connect; infinity if the client cannot open connections."""
        return max(0.0, self._due_at - monotonic())

    async def connect_if_due(self) -> bool:
        """Connect if there is no connection and the last attempt is long enough ago; return whether it did."""
        if self._connection is not None or monotonic() < self._due_at:
            return False
        self._due_at = monotonic() + self._reconnect_pause
        self._reconnect_pause = min(self._reconnect_pause * 2, MAX_RECONNECT)
        try:
            connection = await self._client.connect()
            if connection is None:
                self._due_at = math.inf
                return False
            with self._mutex:
                self._connection = connection
            if self._closing.is_set():  # `interrupt` came too early to find this connection
                await self.disconnect()
                return False
            self._direct = await is_direct(connection, monotonic() + ANSWER_TIMEOUT)
            await self.query(f"LISTEN {quote(self._notifier.channel)}")
            if not self._direct:
                await self._probe_from_outside()
        except Exception as error:
            logger.debug("no connection to listen on: %s", type(error).__name__)
            await self.disconnect()
            return False
        self._reconnect_pause = MIN_RECONNECT
        return True

    async def notifications(self, timeout: float) -> AsyncIterator[str]:
        """Iterate over the payloads that arrive within `timeout` seconds."""
        assert self._connection is not None
        async for notification in self._connection.notifies(timeout=timeout):
            self._probed_at, self._active_at = math.inf, monotonic()
            yield notification.payload

    async def is_unavailable(self) -> bool:
        """Check the last probe: if it got lost, connect again, or behind a pooler give up and return True."""
        if monotonic() - self._probed_at <= PROBE_TIMEOUT:
            return False
        self._probed_at = math.inf
        if self._direct:
            await self.disconnect()
            return False
        await self.query("UNLISTEN *")
        return True

    async def probe_if_silent(self) -> None:
        """Probe the connection after the poll found a change that it missed.

        By a notification, so that polling goes on meanwhile.
        """
        silent = monotonic() - self._active_at > MAX_SILENCE and self._probed_at == math.inf
        # Where the client joins transactions, the poll itself uses this connection.
        if self._connection is not None and self._direct and silent and not self._client.joins_transactions:
            await self._client.query(NOTIFY, self._probe())
            self._probed_at = monotonic()

    async def _probe_from_outside(self) -> None:
        # From another session: through a pooler, a notification to itself could arrive by accident.
        other = await self._client.connect()
        if other is not None:
            try:
                await execute(other, NOTIFY, self._probe(), monotonic() + ANSWER_TIMEOUT)
            finally:
                await other.close()
            self._probed_at = monotonic()

    def _probe(self) -> Sequence[str]:
        return [self._notifier.channel, json_array(encode_payloads([""], self._notifier.sender))]

    async def query(self, sql: str, *params: object) -> Sequence[Row]:
        """Run a statement on this connection."""
        assert self._connection is not None
        rows = await execute(self._connection, sql, params, monotonic() + ANSWER_TIMEOUT)
        self._active_at = monotonic()
        return rows

    async def disconnect_if_broken(self, error: Exception) -> None:
        if self._connection is not None and (self._connection.closed or isinstance(error, UnansweredError)):
            await self.disconnect()

    async def disconnect(self) -> None:
        with self._mutex:
            connection, self._connection = self._connection, None
        self._probed_at = math.inf
        if connection is not None:
            await connection.close()

    def interrupt(self) -> None:
        """End the wait for notifications, from any thread."""
        with self._mutex:
            if self._connection is not None:
                _shut_down_socket(self._connection)


def _shut_down_socket(connection: psycopg.AsyncConnection[Any]) -> None:
    # Closing a connection while another thread waits on it is not safe; ending its traffic is, and wakes that thread.
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
