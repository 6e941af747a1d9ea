"""Other drivers as clients of the stores: SQLAlchemy, Django and asyncpg, each imported only by the one who uses it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload
from zoneinfo import ZoneInfo

import psycopg

from ._async import client as async_client
from ._async import connections as async_connections
from ._sync import client as sync_client
from ._sync import connections as sync_connections
from ._tables import quote
from .errors import sqlstate_of

if TYPE_CHECKING:
    from sqlalchemy import Engine, TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine

    from ._async.client import AsyncPostgresClient
    from ._async.connections import Row
    from ._sync.client import PostgresClient

# SQLSTATE classes after which another attempt may succeed: connection exception, insufficient resources, and, of
# operator intervention, the shutdown and start of a server.
_PASSING = ("08", "53", "57P")

# What is quoted or a comment is matched so that it stays as it is.
_TOKENS = re.compile(r'"[^"]*"|\'[^\']*\'|--[^\n]*|/\*.*?\*/|\$(?P<number>\d+)', re.DOTALL)


@overload
def wrap_sqlalchemy(engine: Engine) -> PostgresClient: ...
@overload
def wrap_sqlalchemy(engine: AsyncEngine) -> AsyncPostgresClient: ...
def wrap_sqlalchemy(engine: Engine | AsyncEngine) -> PostgresClient | AsyncPostgresClient:
    """Let a store use an SQLAlchemy engine, with any driver: an `Engine` or, for an asynchronous store, `AsyncEngine`.

    Each statement takes a connection from the engine's pool, in autocommit mode, and gives it back: a store never takes
    part in a `Session`'s transaction. With the drivers psycopg and psycopg2 readers are woken by announcements, on one
    more connection, which is opened with the parameters of the engine's; with other drivers they are woken by polling.

    Raises `TypeError` for anything but an engine of PostgreSQL. Disposing of the engine is left to the caller.
    """
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    if not isinstance(engine, (Engine, AsyncEngine)):
        raise TypeError(f"an SQLAlchemy Engine or AsyncEngine is needed, not {type(engine).__name__}")
    if engine.dialect.name != "postgresql":
        raise TypeError(f"the engine must be one of PostgreSQL, not of {engine.dialect.name}")
    return _SQLAlchemy(engine) if isinstance(engine, Engine) else _AsyncSQLAlchemy(engine)


def wrap_django(alias: str = "default") -> PostgresClient:
    """Let a store use the connection that Django has for this database in the current thread.

    So the store takes part in `transaction.atomic()`: what is appended in it becomes visible, and is announced, when it
    is committed, and is gone when it is rolled back. Readers are woken by announcements on one more connection, which
    is opened with the parameters of Django's. For code that runs in threads, not in an event loop.

    Raises Django's `ConnectionDoesNotExist` for an unknown alias, and `TypeError` if that is not a PostgreSQL database.
    """
    vendor = _django().connections[alias].vendor
    if vendor != "postgresql":
        raise TypeError(f"Django's database {alias!r} must be one of PostgreSQL, not of {vendor}")
    return _Django(alias)


def wrap_asyncpg(client: Any) -> AsyncPostgresClient:
    """Let an asynchronous store use an asyncpg pool or connection.

    With a connection the store takes part in its transaction, and nothing else may use the connection while a reader
    waits, since asyncpg refuses two statements at a time. Readers are woken by polling.

    Raises `TypeError` for anything else. Closing the pool or connection is left to the caller.
    """
    import asyncpg

    if not isinstance(client, (asyncpg.Pool, asyncpg.Connection)):
        raise TypeError(f"an asyncpg Pool or Connection is needed, not {type(client).__name__}")
    return _AsyncpgPool(client) if isinstance(client, asyncpg.Pool) else _AsyncpgConnection(client)


class _SQLAlchemy(sync_client.Client):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.joins_transactions = False

    def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        with self._engine.connect() as connection:
            result = connection.execute(_text_clause(sql), _named(params))
            return list(map(tuple, result)) if result.returns_rows else []

    def connect(self) -> psycopg.Connection[Row] | None:
        with self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            if isinstance(driver, psycopg.Connection):
                parameters = sync_connections.parameters_of(driver)
            elif self._engine.driver == "psycopg2":
                parameters = _known_to_libpq({**driver.info.dsn_parameters, "password": driver.info.password})
            else:
                return None
        return sync_connections.open_connection(parameters)

    def is_recoverable(self, error: Exception) -> bool:
        return _engine_may_recover(error)


class _AsyncSQLAlchemy(async_client.AsyncClient):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.joins_transactions = False

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        async with self._engine.connect() as connection:
            result = await connection.execute(_text_clause(sql), _named(params))
            return list(map(tuple, result)) if result.returns_rows else []

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        async with self._engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            if not isinstance(driver, psycopg.AsyncConnection):
                return None
            parameters = async_connections.parameters_of(driver)
        return await async_connections.open_connection(parameters)

    def is_recoverable(self, error: Exception) -> bool:
        return _engine_may_recover(error)


class _Django(sync_client.Client):
    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._thread = threading.local()
        self.joins_transactions = True

    @property
    def _wrapper(self) -> Any:
        return _django().connections[self._alias]

    def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        wrapper = self._wrapper
        try:
            with wrapper.cursor() as cursor:
                if params:
                    cursor.execute(_for_django(sql), _named(params))
                else:
                    cursor.execute(sql)
                rows = cursor.fetchall() if cursor.description else []
        finally:
            # In the background nobody else closes it. A lost one Django keeps until the end of the request.
            if getattr(self._thread, "is_background", False) or _is_lost(wrapper):
                wrapper.close()
        return rows if wrapper.timezone is not None else [_aware(row, wrapper.timezone_name) for row in rows]

    def connect(self) -> psycopg.Connection[Row] | None:
        self._thread.is_background = True  # who asks for a connection of its own is no thread of Django's
        wrapper = self._wrapper
        connection = sync_connections.open_connection(_known_to_libpq(wrapper.get_connection_params()))
        if role := wrapper.settings_dict["OPTIONS"].get("assume_role"):
            connection.execute(f"SET ROLE {quote(role)}")
        return connection

    def is_recoverable(self, error: Exception) -> bool:
        lost = isinstance(error, (_django().OperationalError, _django().InterfaceError))
        return lost and not _in_transaction(self._wrapper)

    def in_transaction(self) -> bool:
        return _in_transaction(self._wrapper)

    def release_thread(self) -> None:
        self._wrapper.close()


class _AsyncpgPool(async_client.AsyncClient):
    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.joins_transactions = False

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        return list(map(tuple, await self._pool.fetch(sql, *params)))

    def is_recoverable(self, error: Exception) -> bool:
        import asyncpg

        lost = isinstance(error, (OSError, asyncpg.InterfaceError)) or _is_passing(error)
        return lost and not isinstance(error, ValueError) and not self._pool.is_closing()


class _AsyncpgConnection(async_client.AsyncClient):
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()
        self.joins_transactions = True

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        async with self._turn:
            return list(map(tuple, await self._connection.fetch(sql, *params)))

    def is_recoverable(self, error: Exception) -> bool:
        return False

    def in_transaction(self) -> bool:
        return bool(self._connection.is_in_transaction())


def _django() -> Any:
    from django import db

    return db


def _translated(sql: str, placeholder: str) -> str:
    """Write `$1` as a driver has it, outside of names, literals and comments."""
    return _TOKENS.sub(lambda token: placeholder.format(token["number"]) if token["number"] else token[0], sql)


@lru_cache
def _text_clause(sql: str) -> TextClause:
    from sqlalchemy import text

    return text(_translated(sql.replace(":", "\\:"), ":aibind_{}"))


@lru_cache
def _for_django(sql: str) -> str:
    return _translated(sql.replace("%", "%%"), "%(aibind_{})s")


def _named(params: Sequence[Any]) -> dict[str, Any]:
    # For some drivers SQLAlchemy replaces `%(name)s` wherever it stands, in a table's name too: the name is unlikely.
    return {f"aibind_{number}": value for number, value in enumerate(params, start=1)}


def _known_to_libpq(parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    return {name: value for name, value in parameters.items() if name in known}


def _is_passing(error: Exception) -> bool:
    return (sqlstate_of(error) or "").startswith(_PASSING)


def _engine_may_recover(error: Exception) -> bool:
    from sqlalchemy import exc

    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    lost = isinstance(error, (exc.OperationalError, exc.InterfaceError, exc.TimeoutError))
    # What asyncpg raises while it connects comes as it is.
    return lost or isinstance(error, OSError) or _is_passing(error)


def _in_transaction(wrapper: Any) -> bool:
    return bool(wrapper.in_atomic_block or (wrapper.connection is not None and not wrapper.autocommit))


def _is_lost(wrapper: Any) -> bool:
    return wrapper.connection is not None and wrapper.connection.closed and not _in_transaction(wrapper)


def _aware(row: Row, zone: str) -> Row:
    # With USE_TZ off, Django gives times in the session's zone and takes the zone off.
    return tuple(value.replace(tzinfo=ZoneInfo(zone)) if isinstance(value, datetime) else value for value in row)
