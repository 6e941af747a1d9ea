"""What a store talks to: one protocol, and what turns psycopg's pools and connections into it."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, PoolClosed

from .._concurrency import AsyncLock, async_is_flavour, async_uninterrupted
from ..errors import InvalidDataError, copied

if TYPE_CHECKING:
    from typing_extensions import Self

Row: TypeAlias = tuple[Any, ...]

# What a connection of our own has where the caller's connection string says nothing. A server or a network that has
# gone away is noticed within seconds (tcp_user_timeout is in milliseconds), and text is text, also in a database
# without an encoding.
DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "tcp_user_timeout": "10000",
    "client_encoding": "UTF8",
}


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

    def may_recover(self, error: Exception) -> bool:
        """Say whether the same statement may succeed later, on another connection."""
        return isinstance(error, self._connection_errors)

    def may_be_undone(self) -> bool:
        """Say whether the caller may yet roll back what has just run."""
        return self.joins_transactions

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
        if self._direct is None:
            if connection.info.parameter_status("client_encoding") == "SQL_ASCII":
                raise InvalidDataError("the client_encoding is SQL_ASCII, which knows no text: connect with UTF8")
            self._direct = await is_direct(connection, deadline)
        # Behind a transaction pooler nothing is prepared: the next statement may run in another session, where that
        # name stands for another statement.
        return await execute(connection, sql, params, deadline, prepare=None if self._direct else False)


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
        self._closed = False

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
            await async_uninterrupted(partial(self._give_back, connection, autocommit))

    async def _idle_connection(self, deadline: float) -> psycopg.AsyncConnection[Any]:
        while True:
            # Not by its context manager, which ends a transaction: in autocommit mode there is none to end.
            timeout = max(0.0, min(self._pool.timeout, deadline - monotonic()))
            connection: psycopg.AsyncConnection[Any] = await self._pool.getconn(timeout)
            if not has_ended(connection):
                return connection
            # A pool keeps what has died in it, and after a restart of the server each would cost a caller an error.
            await async_uninterrupted(partial(self._pool.putconn, connection))

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
                raise copied(self._refusal) from self._refusal
            if not self._connected:
                # One connection beforehand: why there is none, the pool would tell the log alone, and us after a time.
                try:
                    async with await psycopg.AsyncConnection.connect(str(self._pool.conninfo)):
                        self._connected = True
                except Exception as error:
                    self._refusal, self._refused_at = error, monotonic()
                    raise
            await self._pool.open()
            if self._closed:  # meanwhile, and too early for `close` to find the pool open
                await self._pool.close()

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        async with self._pool.connection() as connection:
            parameters = parameters_of(connection)
        return await open_connection(parameters)

    def may_recover(self, error: Exception) -> bool:
        lost = isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        # A server that has never answered may not be there at all.
        return lost and not isinstance(error, PoolClosed) and self._connected

    async def close(self) -> None:
        self._closed = True
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

    def may_recover(self, error: Exception) -> bool:
        return False

    def may_be_undone(self) -> bool:
        return self._connection.info.transaction_status != TransactionStatus.IDLE


def as_client(client: AsyncClientLike, timeout: float | None = None) -> AsyncClient:
    """Return what a store talks to. For a connection string this is a pool of its own, closed with the client."""
    if isinstance(client, str):
        given = parameters_in(client)
        conninfo = make_conninfo(client, **{name: value for name, value in DEFAULTS.items() if name not in given})
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            conninfo, kwargs={"autocommit": True}, min_size=1, max_size=10, timeout=10, open=False
        )
        return AsyncPoolClient(pool, timeout, owned=True)
    if isinstance(client, AsyncConnectionPool):
        return AsyncPoolClient(client, timeout)
    if isinstance(client, psycopg.AsyncConnection):
        return AsyncConnectionClient(client, timeout)
    if isinstance(client, AsyncClient) or async_is_flavour(getattr(client, "query", None)):
        if timeout is not None:
            raise ValueError("timeout is for psycopg's pools and connections: set the one of your driver")
        return client if isinstance(client, AsyncClient) else AsyncClient(client)
    accepted = " or ".join(kind.__name__ for kind in (AsyncConnectionPool, psycopg.AsyncConnection))
    raise TypeError(
        f"a client of this store must be a connection string, a psycopg {accepted}, or an object whose query method "
        f"is of the store's flavour, synchronous or asynchronous, not {type(client).__name__}"
    )


def parameters_in(conninfo: str) -> dict[str, Any]:
    """Return the parameters of a connection string; raise `ValueError` for what is none, without repeating it.

    The driver's errors quote parts of it: those for its syntax, and, when it connects, those for a host or a port. A
    password that is not percent-encoded may be in each.
    """
    with suppress(psycopg.ProgrammingError, UnicodeEncodeError):
        given = conninfo_to_dict(conninfo)
        # The folder of a socket may have any character, and the name of an abstract one begins with @.
        hosts = [host for host in str(given.get("host", "")).split(",") if not host.startswith("/")]
        if not any("@" in host[1:] for host in hosts) and re.fullmatch("[0-9, ]*", str(given.get("port", ""))):
            return given
    raise ValueError(
        "not a connection string of PostgreSQL, such as postgresql://user@host/database: "
        "in a user's name or password, @ must be written as %40 there, / as %2F, and % as %25"
    )


class UnansweredError(psycopg.OperationalError):
    """A statement was given up: whether it has taken effect is not known."""


class AsyncTimedCursor(psycopg.AsyncRawCursor[Row]):
    """Gives a statement up that has not been answered by a `deadline` of the monotonic clock.

    Of a peer that takes what is sent and says nothing, nobody else takes notice: TCP holds it for alive.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], deadline: float = math.inf) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._deadline = deadline

    def _execute_gen(self, *args: Any, **options: Any) -> Generator[Any, Any, None]:
        steps = super()._execute_gen(*args, **options)
        return steps if self._deadline == math.inf else self._in_time(steps)

    def _in_time(self, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        # Psycopg goes on with what it waits for several times a second, also if nothing has come.
        ready = None
        with suppress(StopIteration):
            while True:
                wanted = steps.send(ready)
                if monotonic() >= self._deadline:
                    raise UnansweredError("the server has not answered in time")
                ready = yield wanted


async def execute(
    connection: psycopg.AsyncConnection[Any],
    sql: str,
    params: Sequence[Any] = (),
    deadline: float = math.inf,
    *,
    prepare: bool | None = False,
) -> Sequence[Row]:
    """Run one statement on a connection, whatever factories that has, and return its rows."""
    cursor = AsyncTimedCursor(connection, deadline)
    try:
        await cursor.execute(sql, params, binary=True, prepare=prepare)
    except UnansweredError:
        connection.pgconn.finish()  # what is on its way would be taken for the answer to the next statement
        raise
    # Not by the description, which costs as much as the rows.
    return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


def has_ended(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Say whether the other side has closed an idle connection; this costs no round trip."""
    try:
        connection.pgconn.consume_input()  # a last message
        connection.pgconn.consume_input()  # and what comes after it
    except psycopg.OperationalError:
        return True
    return False


async def is_direct(connection: psycopg.AsyncConnection[Any], deadline: float) -> bool:
    """Say whether a connection leads to one server process: the process id that a pooler gives is its own invention."""
    [(process_id,)] = await execute(connection, "SELECT pg_backend_pid()", (), deadline)
    return bool(process_id == connection.info.backend_pid)


def parameters_of(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
    """Return what opens another connection like this one."""
    return {**connection.info.get_parameters(), "password": connection.info.password}


async def open_connection(parameters: Mapping[str, Any]) -> psycopg.AsyncConnection[Row]:
    """Open a connection of our own kind, in autocommit mode, with these parameters of libpq."""
    return await psycopg.AsyncConnection.connect(
        **{**DEFAULTS, **parameters},
        autocommit=True,
        prepare_threshold=None,
    )
