"""Wake subscriptions when other processes change streams: by notifications, with polling as the fallback."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

import psycopg

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_after_cancellation, async_spawn
from .._notifications import decode_payload, encode_payloads, sender_of
from .._poll_pace import QUIET_FACTOR, PollPace
from .._sql import NOTIFY, json_array
from .._sqlstate import server_reason, wrote_nothing
from .._statement_runner import UnansweredError
from .._subscriptions import Subscriptions, wake_all
from .._tables import quote
from ..metrics import NOTIFICATIONS_RECEIVED, POLLS, RECONNECTS, SWITCHES
from .connections import execute, is_direct, share_session, shut_down_socket
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .._followed_stream import FollowedStream
    from .._statement_runner import Row
    from .client import AsyncClient
    from .columns import AsyncQuery
    from .database import AsyncDatabase
    from .leasing import AsyncLeases
    from .notifying import AsyncNotifier
    from .stream_schema import AsyncStreamSchema

logger = logging.getLogger("aibind_postgres.listener")

RESTART_PAUSE = 0.1  # seconds after which the readers of a worker that was cancelled are woken
REFUSED_PAUSE = 10.0  # seconds after the server has refused to end streams
ANSWER_TIMEOUT = 5.0  # seconds to wait for the answer to a statement on the LISTEN connection
PROBE_AFTER = 3.0  # seconds since the last message on that connection before a missed change starts a probe
PROBE_TIMEOUT = 2.0  # seconds within which a probe must arrive
POOLER = "LISTEN does not work on this connection, as through a transaction pooler"
MIN_RECONNECT, MAX_RECONNECT = 0.1, 30.0  # seconds between two attempts to connect; the pause doubles each time


class AsyncListener:
    """Runs the worker that wakes the subscriptions of one store.

    The worker starts when a subscription begins to wait. It ends when there are no subscriptions and none has waited in
    the last `WORKER_IDLE_TIMEOUT` seconds.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        subscriptions: Subscriptions,
        notifier: AsyncNotifier,
        schema: AsyncStreamSchema,
        leases: AsyncLeases,
        poll_interval: float,
    ) -> None:
        self._database = database
        self._client = database.client
        self._subscriptions = subscriptions
        self._notifier = notifier
        self._schema = schema
        self._leases = leases
        self._poll_interval = poll_interval
        self._mutex = Mutex()
        self._worker: AsyncWorker | None = None
        self._connection: AsyncListenConnection | None = None
        self._warned = False
        self._reconnects = 0
        self._expired_remain = False  # the last poll has found streams to end when the contact is steady
        self._may_end_at = 0.0

    def ensure_running(self) -> None:
        """Start the worker if it does not run. Call this after a subscription is registered."""
        if not self._is_running():
            with self._mutex:
                if not self._is_running() and not self._database.closing.is_set():
                    # The connection also identifies the worker: the previous one may not have ended yet.
                    connection = AsyncListenConnection(self._client, self._notifier, self._database.closing)
                    self._connection = connection
                    self._worker = async_spawn(partial(self._run, connection), "aibind_postgres-listener")
                    # A worker that is cancelled before its first step does not wake the readers itself.
                    async_after_cancellation(self._worker, self._wake_readers, RESTART_PAUSE)

    def _wake_readers(self) -> None:
        wake_all(self._subscriptions.changed(None))

    def _is_running(self) -> bool:
        worker = self._worker  # another thread may set the attribute to None
        return worker is not None and worker.is_alive()

    def get_stats(self) -> dict[str, int]:
        """Return whether notifications arrive, whether readers are woken by polling only, and the reconnects."""
        connection = self._connection  # None without a worker
        listening = connection is not None and connection.is_listening
        polling = connection is not None and not listening
        return {"listening": int(listening), "polling": int(polling), "listener_reconnects": self._reconnects}

    async def close(self) -> None:
        """End the worker."""
        with self._mutex:
            worker, connection = self._worker, self._connection
        if connection is not None:
            connection.interrupt()
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _run(self, connection: AsyncListenConnection) -> None:
        pace = PollPace(self._poll_interval)
        awaited_at = polled_at = monotonic()
        has_connected = False
        try:
            while not self._database.closing.is_set():
                if monotonic() - awaited_at > WORKER_IDLE_TIMEOUT:
                    if self._subscriptions.awaited():
                        awaited_at = monotonic()
                    elif self._end_if_idle():
                        return
                if await connection.connect_if_due():
                    self._reconnects += has_connected
                    self._database.count(RECONNECTS, int(has_connected))
                    has_connected = True
                    wake_all(self._subscriptions.changed(None))  # notifications may have been missed
                    self._warn_if_unavailable(connection)
                self._note_switch(connection)
                try:
                    await self._receive(connection, min(polled_at + pace.pause - monotonic(), WORKER_IDLE_TIMEOUT))
                    if monotonic() - polled_at < pace.pause:
                        continue
                    polled_at = monotonic()
                    if streams := self._subscriptions.awaited(quick=pace.is_quick):
                        awaited_at = polled_at
                        if await self._poll(connection, streams):
                            await connection.probe_if_quiet()
                except Exception as error:
                    if self._database.closing.is_set():
                        return
                    # The readers run their own statements, and raise the error in their callers.
                    logger.debug("listening or polling failed: %s", type(error).__name__)
                    self._database.contact.failed()
                    await connection.disconnect_if_broken(error)
                    polled_at = monotonic()
                    pace.failed()
                    wake_all(self._subscriptions.changed(None))
                else:
                    pace.polled()
                    if self._expired_remain:
                        pace.hurry()
        finally:
            with self._mutex:
                if self._connection is connection:
                    self._worker = self._connection = None
            self._wake_readers()  # one that still waits starts another worker
            await connection.disconnect()

    def _end_if_idle(self) -> bool:
        """Unregister the worker. Return True if it must end: there are no subscriptions, or another worker runs."""
        with self._mutex:
            worker, self._worker = self._worker, None
        # A subscription that is registered now finds no worker when it waits, and starts one.
        if self._subscriptions.is_empty():
            return True
        with self._mutex:
            another = self._worker is not None
            self._worker = self._worker or worker
        return another

    async def _receive(self, connection: AsyncListenConnection, timeout: float) -> None:
        timeout = max(0.0, timeout)
        if not connection.is_connected:
            await self._database.closing.wait(min(timeout, connection.seconds_until_connect))
            return
        async for payload in connection.notifications(timeout):
            self._database.count(NOTIFICATIONS_RECEIVED)
            if digests := decode_payload(payload, self._notifier.sender):
                self._notifier.traffic.received(sender_of(payload), monotonic())
                wake_all(self._subscriptions.notified(digests))
        await connection.check_probe()
        self._warn_if_unavailable(connection)

    def _note_switch(self, connection: AsyncListenConnection) -> None:
        """Log and count a switch between notifications and polling."""
        before, connection.was_listening = connection.was_listening, connection.is_listening
        if before in (None, connection.is_listening):
            return
        self._database.count(SWITCHES, 1, {"mode": "polling" if before else "notifications"})
        if before:
            logger.warning(
                "the LISTEN connection was lost: readers are woken by polling, every %g to %g seconds, until it is "
                "open again",
                self._poll_interval,
                QUIET_FACTOR * self._poll_interval,
            )
        else:
            logger.info("notifications arrive: readers are no longer woken by polling alone")

    def _warn_if_unavailable(self, connection: AsyncListenConnection) -> None:
        if connection.unavailable is not None and not self._warned:
            self._warned = True
            logger.warning(
                "notifications unavailable: %s. Readers are woken by polling, every %g to %g seconds: "
                "use a direct connection to a primary server for notifications",
                connection.unavailable,
                self._poll_interval,
                QUIET_FACTOR * self._poll_interval,
            )

    async def _poll(self, connection: AsyncListenConnection, streams: Iterable[FollowedStream]) -> bool:
        """Query the states of these streams. Return True if that found a change."""
        # With the client, the poll uses the search_path, role and privileges of the readers. But a client that joins
        # transactions would use that of a caller, which belongs to another thread.
        own = connection.is_connected and self._client.joins_transactions
        query = connection.query if own else self._client.query
        statements = await self._schema.look_up(query)
        rows = await query(statements.poll, [json_array({stream.id for stream in streams})])
        self._database.count(POLLS)
        self._database.contact.succeeded(monotonic())
        states = {stream_id: (state, total) for stream_id, state, total, _ in rows}
        connection.poll_succeeded()
        self._warn_if_unavailable(connection)
        woken, found = self._subscriptions.polled(streams, states)
        wake_all(woken)
        await self._end_expired([stream_id for stream_id, _, _, is_expired in rows if is_expired], query)
        return found

    async def _end_expired(self, stream_ids: Sequence[str], query: AsyncQuery) -> None:
        """End streams whose leases have expired, unless their producers may not have reached the server either."""
        self._expired_remain = False
        if self._client.joins_transactions and query == self._client.query:
            return  # it would be a write in the transaction of a caller
        if stream_ids and monotonic() >= self._may_end_at:
            if not self._database.contact.is_steady(monotonic()):
                self._expired_remain = True
                return
            try:
                ended = await self._leases.end_expired(stream_ids, query)
            except Exception as error:
                if not wrote_nothing(error):
                    raise
                # A role or server that may only read leaves it to others.
                self._may_end_at = monotonic() + REFUSED_PAUSE
                return
            if self._client.joins_transactions:
                self._notifier.wake(ended)  # this thread has no transaction of the client
            else:
                await self._notifier.changed(ended)


class AsyncListenConnection:
    """The connection that LISTENs. It is opened again when it is lost."""

    def __init__(self, client: AsyncClient, notifier: AsyncNotifier, closing: AsyncEvent) -> None:
        self._client = client
        self._notifier = notifier
        self._closing = closing
        self._mutex = Mutex()
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self.was_listening: bool | None = None  # at the last check for a switch
        self.unavailable: str | None = None  # the reason for which notifications do not arrive
        self._delivers = False  # notifications are known to arrive
        self._probed_at = math.inf  # the time at which the pending probe was sent
        self._active_at = 0.0  # the time of the last message from the server
        self._connect_at = 0.0  # the time of the next attempt to connect
        self._reconnect_pause = MIN_RECONNECT
        self._reachable = False  # a poll has succeeded since the last attempt to connect
        self._refusal: str | None = None  # why the last attempt failed, if the server was reachable before it

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def is_listening(self) -> bool:
        """Whether notifications are known to arrive on the current connection."""
        return self._connection is not None and self._delivers

    @property
    def seconds_until_connect(self) -> float:
        """Seconds until the next attempt to connect; infinity if the client cannot open connections."""
        return max(0.0, self._connect_at - monotonic())

    async def connect_if_due(self) -> bool:
        """Connect if there is no connection and the next attempt is due. Return True if this call connected."""
        if self._connection is not None or monotonic() < self._connect_at:
            return False
        pause = self._reconnect_pause
        self._connect_at = monotonic() + pause
        self._reconnect_pause = min(pause * 2, MAX_RECONNECT)
        was_reachable, self._reachable, self._refusal = self._reachable, False, None
        try:
            connection = await self._client.connect()
            if connection is None:
                self._connect_at = math.inf
                return False
            self._delivers = False
            with self._mutex:
                self._connection = connection
            if self._closing.is_set():  # `interrupt` was called before there was a connection
                await self.disconnect()
                return False
            if await is_direct(connection, monotonic() + ANSWER_TIMEOUT):
                await self._listen()
                self._delivers = True
            else:
                await self._listen_through_pooler(connection)
        except Exception as error:
            logger.debug("the LISTEN connection could not be opened: %s", type(error).__name__)
            if was_reachable:
                self._refusal = server_reason(error) or type(error).__name__
            await self.disconnect()
            self._connect_at = monotonic() + pause  # polling continues meanwhile, also if each attempt takes long
            return False
        self._reconnect_pause = MIN_RECONNECT
        return True

    def poll_succeeded(self) -> None:
        """Record that the server is reachable. If it also was before the last failure to connect, it refuses LISTEN."""
        self._reachable = True
        if self._refusal is not None:
            self.unavailable = f"the server refuses the connection for LISTEN ({self._refusal})"

    async def notifications(self, timeout: float) -> AsyncIterator[str]:
        """Iterate over the payloads that arrive within `timeout` seconds."""
        assert self._connection is not None
        async for notification in self._connection.notifies(timeout=timeout):
            self._probed_at, self._active_at, self._delivers = math.inf, monotonic(), True
            yield notification.payload

    async def check_probe(self) -> None:
        """Disconnect if the last probe did not arrive within `PROBE_TIMEOUT`.

        If no notification has ever arrived, send UNLISTEN instead: the pooler does not forward them.
        """
        if monotonic() - self._probed_at <= PROBE_TIMEOUT:
            return
        self._probed_at = math.inf
        if self._delivers:
            await self.disconnect()
        else:
            self.unavailable = POOLER
            await self.query(f"UNLISTEN {quote(self._notifier.channel)}")

    async def probe_if_quiet(self) -> None:
        """Probe the LISTEN connection after polling found a change it missed.

        The probe is a notification: polling continues while it is under way.
        """
        is_quiet = monotonic() - self._active_at > PROBE_AFTER and self._probed_at == math.inf
        # If the client joins transactions, the poll itself uses this connection.
        if self._connection is not None and self._delivers and is_quiet and not self._client.joins_transactions:
            try:
                await self._client.query(NOTIFY, self._probe_params())
                self._probed_at = monotonic()
            except Exception as error:
                if not wrote_nothing(error):
                    raise
                self._active_at = monotonic()  # the server refuses notifications: polling continues at its pace

    async def _listen(self) -> None:
        await self.query(f"LISTEN {quote(self._notifier.channel)}")

    async def _listen_through_pooler(self, connection: psycopg.AsyncConnection[Row]) -> None:
        """LISTEN and send a probe, unless the session is shared: LISTEN would last in it, and affect other clients."""
        other = await self._client.connect()
        assert other is not None  # like the first one
        try:
            if await share_session(connection, other, PROBE_TIMEOUT):
                self.unavailable = POOLER
            else:
                await self._listen()
                await execute(other, NOTIFY, self._probe_params(), monotonic() + ANSWER_TIMEOUT)
                self._probed_at = monotonic()
        finally:
            await other.close()

    def _probe_params(self) -> Sequence[str]:
        return [self._notifier.channel, json_array(encode_payloads([""], self._notifier.sender))]

    async def query(self, sql: str, params: Sequence[object] = ()) -> Sequence[Row]:
        """Run a statement on this connection."""
        assert self._connection is not None
        rows = await execute(self._connection, sql, params, monotonic() + ANSWER_TIMEOUT)
        self._active_at = monotonic()
        return rows

    async def disconnect_if_broken(self, error: Exception) -> None:
        self._reachable = False
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
                shut_down_socket(self._connection)
