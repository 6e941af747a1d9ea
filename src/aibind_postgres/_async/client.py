"""The client of a store: the public protocol, and the clients for psycopg's pools and connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed

from .._concurrency import (
    AsyncEvent,
    AsyncLock,
    async_call_or_await,
    async_matches_flavour,
    async_shielded,
)
from .._conninfo import with_defaults
from .._sqlstate import is_read_only, is_recoverable
from .._workarounds import async_at_end_of_loop, async_checkout, async_put_again, is_closed_by_server
from ..errors import InvalidDataError, copy_error
from .connections import (
    Row,
    UnansweredError,
    cancel_and_close,
    execute,
    is_direct,
    open_connection,
    parameters_of,
)

MIN_DRAIN_INTERVAL = 1.0  # seconds; a server that stays read-only must not cause a new connection for each call


class AsyncPostgresClient(Protocol):
    """The protocol for a driver other than psycopg: any object with this `query` method.

    Attributes:
        connection_errors: Optional. A tuple of the exception classes after which another attempt may succeed. Errors
            with a recoverable code in the attribute `sqlstate` need no entry. Default: none.
        joins_transactions: Optional. Whether statements may run inside a transaction of the caller. Default: False.
    """

    async def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]:
        """Run one statement and return its rows.

        Several tasks or threads may call this at the same time.

        Args:
            sql: The statement, with numbered parameters: `$1`, `$2` and so on.
            params: The values of the parameters.

        Returns:
            The rows, each a sequence or a mapping, in the order of the select list. Empty if the statement returns no
            rows.
        """
        ...


AsyncClientLike: TypeAlias = str | AsyncConnectionPool[Any] | psycopg.AsyncConnection[Any] | AsyncPostgresClient


class AsyncClient:
    """The interface that stores use. This class wraps an object with the `PostgresClient` protocol.

    The clients for psycopg and the adapters for other drivers are subclasses.
    """

    def __init__(self, client: AsyncPostgresClient) -> None:
        self._client = client
        self._connection_errors = tuple(getattr(client, "connection_errors", ()))
        self.joins_transactions = bool(getattr(client, "joins_transactions", False))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self._client).__name__}>"

    def is_connected(self) -> bool:
        """Return True if there are open connections, which a forked process would share."""
        return False

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        """Run one statement and return its rows as tuples."""
        rows = await self._client.query(sql, params)
        return [tuple(row.values()) if isinstance(row, Mapping) else tuple(row) for row in rows]

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        """Open another connection to the same database, in autocommit mode. Return None if this is not possible."""
        return None

    def is_recoverable(self, error: Exception) -> bool:
        """Return True if the same statement may succeed later, on another connection."""
        listed = isinstance(error, self._connection_errors)
        return listed or (not self.joins_transactions and is_recoverable(error))

    def in_transaction(self) -> bool:
        """Return True if the caller can still roll back the last statement."""
        return self.joins_transactions

    def capture_settings(self) -> Callable[[], None]:
        """Return a function that copies the settings of this thread, such as a tenant, to the thread that calls it.

        Writers and producers call it in their workers.
        """
        return _do_nothing

    async def release_thread(self) -> None:
        """Release the connection of the current thread. Writers and producers call this in their workers."""

    async def close(self) -> None:
        """Close the connections that this client owns."""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _do_nothing() -> None:
    """Do nothing."""


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
            if connection.pgconn.parameter_status(b"client_encoding") == b"SQL_ASCII":
                raise InvalidDataError(
                    "the connection's client_encoding is SQL_ASCII, with which psycopg returns bytes: use UTF8"
                )
            if self._direct is None:
                self._direct = await is_direct(connection, deadline)
            # Through a transaction pooler, the next statement may run in another session, in which a prepared statement
            # with the same name may differ.
            return await execute(connection, sql, params, deadline, prepare=None if self._direct else False)
        except UnansweredError:
            await cancel_and_close(connection)
            raise


class AsyncPoolClient(AsyncPsycopgClient):
    """The client for a psycopg pool. The first statement opens an `owned` pool, and `close` closes it."""

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self._pool).__name__} {self._pool.name!r}>"

    def is_connected(self) -> bool:
        return not self._pool.closed

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        if self._owned and self._pool.closed:
            await self._open()
        deadline = monotonic() + self._timeout
        checkout_deadline = min(deadline, monotonic() + self._pool.timeout)
        while True:
            connection: psycopg.AsyncConnection[Any] | None = None
            autocommit = True
            returned: list[bool] = []
            # A signal handler may raise anywhere, so `finally` must know the connection as soon as the pool returns it.
            try:
                # Not `connection()` of the pool: it would end a transaction, and in autocommit mode there is none.
                connection = await async_checkout(self._pool, max(0.0, checkout_deadline - monotonic()))
                if is_closed_by_server(connection):
                    continue  # the pool replaces it
                autocommit = connection.autocommit
                if not autocommit:
                    if connection.read_only is not None:  # autocommit mode would ignore it
                        async with connection.transaction():
                            return await self._run(connection, sql, params, deadline)
                    # Saves the round trips of BEGIN and COMMIT. Changing the mode needs no round trip.
                    await connection.set_autocommit(True)
                return await self._run(connection, sql, params, deadline)
            except psycopg.Error as error:
                if is_read_only(error):
                    await self._replace_connections()
                raise
            finally:
                try:
                    if connection is not None:
                        # A pool loses a connection if `putconn` is cancelled.
                        await async_shielded(partial(self._return_connection, connection, autocommit, returned))
                except BaseException:
                    if connection is not None and not returned:  # else another caller may have got it
                        await async_put_again(partial(self._return_connection, connection, autocommit, returned))
                    raise

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
            await async_shielded(self._pool.drain)  # the pool loses connections if it is cancelled

    async def _open(self) -> None:
        called_at = monotonic()
        async with self._opening:
            if self._connect_error is not None and self._connect_failed_at > called_at:
                raise copy_error(self._connect_error)  # another caller failed while this one waited
            if not self._has_connected:
                # A failure to connect must raise: the pool only logs it, and its callers get a timeout.
                try:
                    async with await psycopg.AsyncConnection.connect(str(self._pool.conninfo)):
                        self._has_connected = True
                except Exception as error:
                    # The copy has no traceback, which would keep the frames of the caller alive.
                    self._connect_error, self._connect_failed_at = copy_error(error), monotonic()
                    raise
            if self._pool.closed:
                async_at_end_of_loop(self._pool.close, unless=self._closed)
                await self._pool.open()
            if self._closed.is_set():  # `close` was called before the pool was open
                await self._pool.close()

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        # Connect as the pool does: its callables or its class may renew a password that has expired since.
        conninfo, kwargs = self._pool.conninfo, self._pool.kwargs
        if callable(conninfo):
            conninfo = await async_call_or_await(conninfo)
        if callable(kwargs):
            kwargs = await async_call_or_await(kwargs)
        return await open_connection(kwargs or {}, conninfo or "", self._pool.connection_class)

    def is_recoverable(self, error: Exception) -> bool:
        recoverable = is_recoverable(error, (psycopg.OperationalError, psycopg.InterfaceError))
        # Before the first connection, the address may be wrong: retries would delay the error.
        return recoverable and not isinstance(error, PoolClosed) and self._has_connected

    async def close(self) -> None:
        self._closed.set()
        if self._owned:
            await self._pool.close()


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


def as_client(client: AsyncClientLike, timeout: float | None = None) -> AsyncClient:
    """Return the client for the `client` argument of a store. A connection string becomes a pool that the client owns.

    Raises:
        ValueError: The connection string is malformed, or `timeout` is given for the client of another driver.
        TypeError: The argument is not a client of this flavour.
    """
    if isinstance(client, str):
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            with_defaults(client),
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
        return AsyncPoolClient(pool, timeout, owned=True)
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
    accepted = " or ".join(kind.__name__ for kind in (AsyncConnectionPool, psycopg.AsyncConnection))
    raise TypeError(
        f"the client must be a connection string, a psycopg {accepted}, or an object with a query method of the "
        f"store's flavour, synchronous or asynchronous, not {type(client).__name__}"
    )
