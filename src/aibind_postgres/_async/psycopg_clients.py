"""The clients for psycopg's pools and connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed

from .._concurrency import (
    AsyncEvent,
    AsyncLock,
    Mutex,
    async_call_or_await,
    async_matches_flavour,
    async_shielded,
)
from .._conninfo import with_defaults
from .._sqlstate import is_read_only, is_recoverable
from .._statement_runner import Row, UnansweredError
from .._workarounds import async_at_end_of_loop, async_checkout, async_close_pool, async_put_again, is_closed_by_server
from ..errors import copy_error
from .client import AsyncClient, AsyncPostgresClient
from .connections import cancel_and_close, execute, is_direct, open_connection, parameters_of

AsyncClientLike: TypeAlias = str | AsyncConnectionPool[Any] | psycopg.AsyncConnection[Any] | AsyncPostgresClient

MIN_DRAIN_INTERVAL = 1.0  # seconds; a server that stays read-only must not cause a new connection for each call

# Seconds for which a store keeps a connection of its own pool. Returned to the pool, it is checked for its lifetime.
MAX_KEPT = 1.0


class AsyncPsycopgClient(AsyncClient):
    """Base class of the clients for psycopg: runs a statement on a connection."""

    joins_transactions = False

    def __init__(self, timeout: float | None) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._direct: bool | None = None  # None: not known yet

    async def _run(
        self, connection: psycopg.AsyncConnection[Any], sql: str, params: Sequence[Any], deadline: float
    ) -> Sequence[Row]:
        try:
            if self._direct is None:
                self._direct = await is_direct(connection, deadline)
            # Through a transaction pooler, the next statement may run in another session, in which a prepared statement
            # with the same name may differ.
            return await execute(connection, sql, params, deadline, prepare=self._direct)
        except UnansweredError:
            await cancel_and_close(connection)
            raise

    def is_unavailable(self, error: Exception) -> bool:
        recoverable = is_recoverable(error, (psycopg.OperationalError, psycopg.InterfaceError))
        return recoverable and not isinstance(error, PoolClosed)


class AsyncPoolClient(AsyncPsycopgClient):
    """The client for a psycopg pool. The first statement opens an `owned` pool, and `close` closes it.

    An owned pool has no other users. One of its connections is kept between two statements, or more while `keep` says
    so: to take it from the pool and to put it back would cost as much processor time as a statement.
    """

    def __init__(self, pool: AsyncConnectionPool[Any], timeout: float | None, *, owned: bool = False) -> None:
        super().__init__(timeout)
        self._pool = pool
        self._owned = owned
        self._has_connected = not owned
        self._opening = AsyncLock()
        self._connect_error: Exception | None = None
        self._connect_failed_at = 0.0
        self._drained_at = -math.inf
        self._closed = AsyncEvent()
        self._opened = not owned
        self._mutex = Mutex()
        self._most_kept = 1 if owned else 0
        # The kept connections, each with the time at which it was taken from the pool. The last one is used first.
        self._kept: list[tuple[psycopg.AsyncConnection[Any], float]] = []
        self._waiting: set[object] = set()  # callers that take a connection from the pool

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self._pool).__name__} {self._pool.name!r}>"

    def is_connected(self) -> bool:
        return not self._pool.closed

    async def query(self, sql: str, params: Sequence[Any], timeout: float = math.inf) -> Sequence[Row]:
        if not self._opened:
            await self._open()
        now = monotonic()
        deadline = now + min(self._timeout, timeout)
        while True:
            connection: psycopg.AsyncConnection[Any] | None = None
            since = now
            autocommit = True
            succeeded = False
            caller = object()
            returned: list[bool] = []
            # A signal handler may raise after any call, so `finally` must know the connection as soon as it is taken.
            try:
                if self._owned:
                    with self._mutex:
                        if self._kept:
                            kept = self._kept[-1]
                            del self._kept[-1]
                            connection, since = kept
                        else:
                            self._waiting.add(caller)
                if connection is None:
                    # Not `connection()` of the pool: it would end a transaction, and in autocommit mode there is none.
                    checkout_deadline = min(deadline, now + self._pool.timeout)
                    connection = await async_checkout(self._pool, max(0.0, checkout_deadline - monotonic()))
                    self._waiting.discard(caller)
                if is_closed_by_server(connection):
                    continue  # the pool replaces it
                autocommit = self._owned or connection.autocommit
                if not autocommit:
                    if connection.read_only is not None:  # autocommit mode would ignore it
                        async with connection.transaction():
                            return await self._run(connection, sql, params, deadline)
                    # Saves the round trips of BEGIN and COMMIT. Changing the mode needs no round trip.
                    await connection.set_autocommit(True)
                rows = await self._run(connection, sql, params, deadline)
                succeeded = True
                return rows
            except psycopg.Error as error:
                if is_read_only(error):
                    await self._replace_connections()
                raise
            finally:
                try:
                    self._waiting.discard(caller)
                    if connection is not None and succeeded and now - since < MAX_KEPT:
                        with self._mutex:
                            if len(self._kept) < self._most_kept and not self._waiting:
                                # No call may separate these two assignments, as above.
                                self._kept, connection = [*self._kept, (connection, since)], None
                    if connection is not None:
                        # A pool loses a connection if `putconn` is cancelled.
                        await async_shielded(partial(self._return_connection, connection, autocommit, returned))
                except BaseException:
                    if connection is not None and not returned:  # else another caller may have got it
                        await async_put_again(partial(self._return_connection, connection, autocommit, returned))
                    raise

    def get_stats(self) -> dict[str, int]:
        return self._pool.get_stats() if self._owned else {}

    async def query_within(self, sql: str, params: Sequence[Any], timeout: float) -> Sequence[Row]:
        try:
            return await self.query(sql, params, timeout)
        except Exception as error:
            if not self.is_unavailable(error):
                raise
        # The other connections of the pool may be silent as well, or all in use. After an outage, a pool may pause for
        # minutes before it connects again.
        async with await self._connect(connect_timeout=math.ceil(timeout)) as connection:
            return await self._run(connection, sql, params, monotonic() + timeout)

    async def _return_connection(
        self, connection: psycopg.AsyncConnection[Any], autocommit: bool, returned: list[bool]
    ) -> None:
        try:
            if not autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
                await connection.set_autocommit(False)
        except psycopg.Error:
            await connection.close()  # the pool replaces it
        await self._pool.putconn(connection)
        returned.append(True)

    async def _replace_connections(self) -> None:
        """Let the pool replace its connections: after a failover, sessions that were read-only may stay so."""
        if monotonic() - self._drained_at > MIN_DRAIN_INTERVAL:
            self._drained_at = monotonic()
            await async_shielded(self._drain)  # the pool loses connections if it is cancelled

    async def _drain(self) -> None:
        await self._put_back(0)
        await self._pool.drain()

    async def keep(self, most: int) -> None:
        if self._owned and self._most_kept != most:
            with self._mutex:
                if self._closed.is_set():
                    return
                self._most_kept = most
            await self._put_back(most)

    async def _put_back(self, most: int) -> None:
        """Put kept connections back into the pool until there are at most `most`."""
        while True:
            with self._mutex:
                if len(self._kept) <= most:
                    return
                kept, _ = self._kept.pop(0)
            try:
                await async_shielded(partial(self._pool.putconn, kept))
            except BaseException:
                await async_put_again(partial(self._pool.putconn, kept))
                raise

    async def _open(self) -> None:
        called_at = monotonic()
        async with self._opening:
            if self._connect_error is not None and self._connect_failed_at > called_at:
                raise copy_error(self._connect_error)  # another caller failed while this one waited
            if not self._has_connected:
                # A failure to connect must raise: the pool only logs it, and its callers get a timeout.
                try:
                    async with await psycopg.AsyncConnection.connect(await self._conninfo()):
                        self._has_connected = True
                except Exception as error:
                    # The copy has no traceback, which would keep the frames of the caller alive.
                    self._connect_error, self._connect_failed_at = copy_error(error), monotonic()
                    raise
            if self._pool.closed:
                async_at_end_of_loop(self._close_pool, unless=self._closed)
                await self._pool.open()
            self._opened = True
            if self._closed.is_set():  # `close` was called before the pool was open
                await self._pool.close()

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        return await self._connect()

    async def _connect(self, **options: int) -> psycopg.AsyncConnection[Row]:
        # Connect as the pool does: its callables or its class may renew a password that has expired since.
        conninfo, kwargs = await self._conninfo(), self._pool.kwargs
        if callable(kwargs):
            kwargs = await async_call_or_await(kwargs)
        return await open_connection({**(kwargs or {}), **options}, conninfo, self._pool.connection_class)

    async def _conninfo(self) -> str:
        conninfo = self._pool.conninfo
        if callable(conninfo):
            conninfo = await async_call_or_await(conninfo)
        return conninfo or ""

    def is_recoverable(self, error: Exception) -> bool:
        # Before the first connection, the address may be wrong: retries would delay the error.
        return self.is_unavailable(error) and self._has_connected

    async def close(self) -> None:
        self._closed.set()
        if self._owned:
            await async_shielded(self._close_pool)

    async def _close_pool(self) -> None:
        with self._mutex:
            self._most_kept = 0
        try:
            await self._put_back(0)
        finally:
            await async_close_pool(self._pool)


class AsyncConnectionClient(AsyncPsycopgClient):
    """The client for a psycopg connection of the caller. Statements take part in its transaction."""

    joins_transactions = True

    def __init__(self, connection: psycopg.AsyncConnection[Any], timeout: float | None) -> None:
        super().__init__(timeout)
        self._connection = connection

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._connection!r}>"

    def is_connected(self) -> bool:
        return True

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        return await self._run(self._connection, sql, params, monotonic() + self._timeout)

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        return await open_connection(parameters_of(self._connection))

    def is_recoverable(self, error: Exception) -> bool:
        return False

    def in_transaction(self) -> bool:
        return self._connection.info.transaction_status != TransactionStatus.IDLE


async def _keep_connecting(pool: AsyncConnectionPool[Any]) -> None:
    """Let a pool that has given up connecting try again if callers wait for a connection."""
    if pool.get_stats()["requests_waiting"]:
        await pool.check()


def make_pool(conninfo: str | Callable[[], str]) -> AsyncConnectionPool[Any]:
    """Return a pool for one store, which opens and closes it. A function is called for each new connection."""
    return AsyncConnectionPool(
        conninfo,
        kwargs={"autocommit": True},
        min_size=1,
        max_size=10,
        timeout=10,
        max_idle=1,  # seconds: unused connections are closed, since other stores may need them
        reconnect_timeout=2,  # psycopg doubles the pauses between attempts up to this time: 1 s each
        reconnect_failed=_keep_connecting,
        open=False,
        name="pool of aibind_postgres",
    )


def as_client(client: AsyncClientLike, timeout: float | None = None) -> AsyncClient:
    """Return the client for the `client` argument of a store. A connection string becomes a pool that the client owns.

    Raises:
        ValueError: The connection string is malformed, or `timeout` is given for the client of another driver.
        TypeError: The argument is not a client of this flavour.
    """
    if isinstance(client, str):
        return AsyncPoolClient(make_pool(with_defaults(client)), timeout, owned=True)
    if isinstance(client, AsyncConnectionPool):
        return AsyncPoolClient(client, timeout)
    if isinstance(client, psycopg.AsyncConnection):
        return AsyncConnectionClient(client, timeout)
    if not isinstance(client, AsyncClient) and async_matches_flavour(getattr(client, "query", None)):
        client = AsyncClient(client)
    if isinstance(client, AsyncClient):
        if timeout is not None:
            raise ValueError("timeout applies to psycopg's pools and connections only: set a timeout in your driver")
        return client
    if (flavour_hint := getattr(client, "flavour_hint", None)) is not None:
        raise TypeError(f"the client {client!r} does not match the store: {flavour_hint}")
    accepted = " or ".join(kind.__name__ for kind in (AsyncConnectionPool, psycopg.AsyncConnection))
    raise TypeError(
        f"the client must be a connection string, a psycopg {accepted}, or an object with a query method of the "
        f"store's flavour, synchronous or asynchronous, not {type(client).__name__}"
    )
