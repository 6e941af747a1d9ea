"""What a store talks to: one protocol, and what turns psycopg's pools and connections into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed

from .._concurrency import (
    AsyncEvent,
    AsyncLock,
    async_at_end_of_loop,
    async_is_flavour,
    async_shielded,
    async_take,
)
from ..errors import InvalidDataError, copy_error
from .connections import (
    Row,
    UnansweredError,
    abandon,
    execute,
    has_ended,
    is_direct,
    open_connection,
    parameters_of,
    with_defaults,
)

if TYPE_CHECKING:
    from typing_extensions import Self


CONNECTION_TIMEOUT = 5.0  # seconds to wait for a connection of a pool, where the caller has something else to do


class AsyncPostgresClient(Protocol):
    """Anything that runs a statement: the adapter for a driver that is not psycopg.

    `query` runs one statement with numbered parameters (`$1` …) and returns its rows, each a sequence or a mapping in
    the order of the select list. It must be safe to call from several tasks or threads at once.

    Two attributes are optional: `connection_errors`, the exceptions after which another attempt may succeed, and
    `joins_transactions`, true if statements take part in a transaction of the caller.
    """

    async def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]: ...


AsyncClientLike: TypeAlias = str | AsyncConnectionPool[Any] | psycopg.AsyncConnection[Any] | AsyncPostgresClient


class AsyncClient:
    """A client as the stores see it; in this plain form, around an object with the `PostgresClient` protocol.

    The clients for psycopg, and the adapters for other drivers, are its subclasses.
    """

    def __init__(self, client: AsyncPostgresClient) -> None:
        self._client = client
        self._connection_errors = tuple(getattr(client, "connection_errors", ()))
        self.joins_transactions = bool(getattr(client, "joins_transactions", False))

    def is_connected(self) -> bool:
        """Say whether there are connections that a process forked now would share."""
        return False

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        """Run one statement and return its rows as tuples."""
        rows = await self._client.query(sql, params)
        return [tuple(row.values()) if isinstance(row, Mapping) else tuple(row) for row in rows]

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        """Open another connection to the same database, in autocommit mode, if the client knows how."""
        return None

    def is_recoverable(self, error: Exception) -> bool:
        """Say whether the same statement may succeed later, on another connection."""
        return isinstance(error, self._connection_errors)

    def in_transaction(self) -> bool:
        """Say whether the caller may yet roll back what has just run."""
        return self.joins_transactions

    async def release_thread(self) -> None:
        """Release what the current thread holds. To be called by a worker of a store at its end."""

    async def close(self) -> None:
        """Release what this client has opened itself."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncPsycopgClient(AsyncClient):
    """What psycopg's pools and connections have in common: how a statement runs on a connection."""

    joins_transactions = False

    def __init__(self, timeout: float | None) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._direct: bool | None = None  # once it is known

    async def _run(
        self, connection: psycopg.AsyncConnection[Any], sql: str, params: Sequence[Any], deadline: float
    ) -> Sequence[Row]:
        try:
            if self._direct is None:
                if connection.info.parameter_status("client_encoding") == "SQL_ASCII":
                    raise InvalidDataError("the client_encoding is SQL_ASCII, which knows no text: connect with UTF8")
                self._direct = await is_direct(connection, deadline)
            # Behind a transaction pooler nothing is prepared: the next statement may run in another session, where that
            # name stands for another statement.
            return await execute(connection, sql, params, deadline, prepare=None if self._direct else False)
        except UnansweredError:
            await abandon(connection)
            raise


class AsyncPoolClient(AsyncPsycopgClient):
    """A psycopg pool. If it is `owned`, the first statement opens it, and it is closed with the store."""

    def __init__(self, pool: AsyncConnectionPool[Any], timeout: float | None, *, owned: bool = False) -> None:
        super().__init__(timeout)
        self._pool = pool
        self._owned = owned
        self._connected = not owned
        self._opening = AsyncLock()
        self._refusal: Exception | None = None
        self._refused_at = 0.0
        self._closed = AsyncEvent()

    def is_connected(self) -> bool:
        return not self._pool.closed

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        if self._owned and self._pool.closed:
            await self._open()
        deadline = monotonic() + self._timeout
        connection = await self._idle_connection(deadline)
        autocommit = connection.autocommit
        try:
            if not autocommit:
                # Changing the mode of an idle connection is local: it saves the round trips of BEGIN and COMMIT.
                await connection.set_autocommit(True)
            return await self._run(connection, sql, params, deadline)
        finally:
            # A pool would lose a connection whose return is interrupted.
            await async_shielded(partial(self._give_back, connection, autocommit))

    async def _idle_connection(self, deadline: float) -> psycopg.AsyncConnection[Any]:
        deadline = min(deadline, monotonic() + self._pool.timeout)
        while True:
            # Not by its context manager, which ends a transaction: in autocommit mode there is none to end.
            remaining = max(0.0, deadline - monotonic())
            connection: psycopg.AsyncConnection[Any] = await async_take(
                partial(self._pool.getconn, remaining), self._pool.putconn
            )
            if not has_ended(connection):
                return connection
            # A pool keeps what has died in it, and after a restart of the server each would cost a caller an error.
            await async_shielded(partial(self._pool.putconn, connection))

    async def _give_back(self, connection: psycopg.AsyncConnection[Any], autocommit: bool) -> None:
        try:
            if not autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
                await connection.set_autocommit(False)
        finally:
            await self._pool.putconn(connection)

    async def _open(self) -> None:
        asked_at = monotonic()
        async with self._opening:
            if self._refusal is not None and self._refused_at > asked_at:  # while this caller waited for its turn
                raise copy_error(self._refusal)
            if not self._connected:
                # One connection beforehand: why there is none, the pool would tell the log alone, and us after a time.
                try:
                    async with await psycopg.AsyncConnection.connect(str(self._pool.conninfo)):
                        self._connected = True
                except Exception as error:
                    self._refusal, self._refused_at = copy_error(error), monotonic()  # a copy has no traceback
                    raise
            if self._pool.closed:
                # A worker of a pool that is cancelled while it connects goes on, and waits for ever to be told to end.
                async_at_end_of_loop(self._pool.close, unless=self._closed)
                await self._pool.open()
            if self._closed.is_set():  # meanwhile, and too early for `close` to find the pool open
                await self._pool.close()

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        # For announcements, by the worker that polls if there are none: not to be held up by a pool that is busy.
        async with self._pool.connection(min(self._pool.timeout, CONNECTION_TIMEOUT)) as connection:
            parameters = parameters_of(connection)
        return await open_connection(parameters)

    def is_recoverable(self, error: Exception) -> bool:
        lost = isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        # A server that has never answered may not be there at all.
        return lost and not isinstance(error, PoolClosed) and self._connected

    async def close(self) -> None:
        self._closed.set()
        if self._owned:
            await self._pool.close()


class AsyncConnectionClient(AsyncPsycopgClient):
    """One psycopg connection of the caller's, in its transaction if it is inside one."""

    joins_transactions = True

    def __init__(self, connection: psycopg.AsyncConnection[Any], timeout: float | None) -> None:
        super().__init__(timeout)
        self._connection = connection

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


def as_client(client: AsyncClientLike, timeout: float | None = None) -> AsyncClient:
    """Return what a store talks to. For a connection string this is a pool of its own, closed with the client."""
    if isinstance(client, str):
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            with_defaults(client),
            kwargs={"autocommit": True},
            min_size=1,
            max_size=10,
            timeout=10,
            open=False,
            name="pool of aibind_postgres",
        )
        return AsyncPoolClient(pool, timeout, owned=True)
    if isinstance(client, AsyncConnectionPool):
        return AsyncPoolClient(client, timeout)
    if isinstance(client, psycopg.AsyncConnection):
        return AsyncConnectionClient(client, timeout)
    if not isinstance(client, AsyncClient) and async_is_flavour(getattr(client, "query", None)):
        client = AsyncClient(client)
    if isinstance(client, AsyncClient):
        if timeout is not None:
            raise ValueError("timeout is for psycopg's pools and connections: set the one of your driver")
        return client
    accepted = " or ".join(kind.__name__ for kind in (AsyncConnectionPool, psycopg.AsyncConnection))
    raise TypeError(
        f"a client of this store must be a connection string, a psycopg {accepted}, or an object whose query method "
        f"is of the store's flavour, synchronous or asynchronous, not {type(client).__name__}"
    )
