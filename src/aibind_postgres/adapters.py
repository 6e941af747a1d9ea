"""Clients for other drivers: SQLAlchemy, Django and asyncpg. Each driver is imported on first use."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast, overload
from zoneinfo import ZoneInfo

import psycopg

from ._async import client as async_client
from ._async.client import AsyncPostgresClient
from ._sqlstate import innermost, is_read_only, is_recoverable
from ._statement_runner import Row
from ._sync import client as sync_client
from ._sync import connections as sync_connections
from ._sync.client import PostgresClient
from ._tables import quote

if TYPE_CHECKING:
    from sqlalchemy import Engine, TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine
else:  # `typing.get_type_hints` needs the names at run time, without the extra
    Engine = AsyncEngine = TextClause = Any

CONNECT_ERRORS = (OSError, asyncio.TimeoutError)  # of asyncpg; before Python 3.11, the second is no OSError

# Matches quoted names, literals and comments as well, so that a `$1` inside them stays unchanged.
_TOKENS = re.compile(r'"[^"]*"|\'[^\']*\'|--[^\n]*|/\*.*?\*/|\$(?P<number>\d+)', re.DOTALL)


@overload
def wrap_sqlalchemy(engine: Engine) -> PostgresClient: ...
@overload
def wrap_sqlalchemy(engine: AsyncEngine) -> AsyncPostgresClient: ...
def wrap_sqlalchemy(engine: Engine | AsyncEngine) -> PostgresClient | AsyncPostgresClient:
    """Use an SQLAlchemy engine as the client of a store.

    Each statement uses a connection of the engine's pool in autocommit mode: a store never takes part in the
    transaction of a `Session`.

    With the drivers psycopg and psycopg2, readers receive notifications. The listener takes one connection out of the
    engine's pool, which opens another one instead; with psycopg2, it opens a connection with the same parameters. With
    other drivers, readers poll.

    Args:
        engine: An `Engine`, or an `AsyncEngine` for an asynchronous store, with any driver. The caller disposes of it.

    Returns:
        The client.

    Raises:
        TypeError: The argument is not an engine, or its database is not PostgreSQL.

    Example:
        store = PostgresStreamStore(wrap_sqlalchemy(engine))
    """
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    if not isinstance(engine, (Engine, AsyncEngine)):
        raise TypeError(f"engine must be an SQLAlchemy Engine or AsyncEngine, not {type(engine).__name__}")
    if engine.dialect.name != "postgresql":
        raise TypeError(f"engine must have the dialect postgresql, not {engine.dialect.name}")
    return _SQLAlchemy(engine) if isinstance(engine, Engine) else _AsyncSQLAlchemy(engine)


def wrap_django(alias: str = "default") -> PostgresClient:
    """Use Django's connection of the current thread as the client of a synchronous store.

    An asynchronous store raises `TypeError`, since Django's connections are synchronous: use
    `async_stream_store` and `async_conversation_store` of `aibind_postgres.contrib.django`.

    The store takes part in `transaction.atomic()`. Chunks appended inside the block become visible when it commits, and
    readers are notified then. A rollback removes the chunks. The listener opens one more connection, as
    Django opens its own.

    Args:
        alias: The name of the database in Django's setting DATABASES. Default: "default".

    Returns:
        The client.

    Raises:
        django.db.utils.ConnectionDoesNotExist: The alias is unknown.
        TypeError: The database is not PostgreSQL.

    Example:
        store = PostgresStreamStore(wrap_django())
    """
    vendor = _django().connections[alias].vendor
    if vendor != "postgresql":
        raise TypeError(f"Django's database {alias!r} must have the vendor postgresql, not {vendor}")
    return _Django(alias)


def wrap_asyncpg(client: Any) -> AsyncPostgresClient:
    """Use an asyncpg pool or connection as the client of an asynchronous store.

    Readers poll, without notifications. With a connection, the store takes part in its transaction. Do not use that
    connection for anything else while a reader waits, since asyncpg rejects simultaneous statements.

    Args:
        client: The asyncpg pool or connection. The caller closes it.

    Returns:
        The client.

    Raises:
        TypeError: The argument is neither a pool nor a connection.

    Example:
        store = AsyncPostgresStreamStore(wrap_asyncpg(pool))
    """
    import asyncpg

    if not isinstance(client, (asyncpg.Pool, asyncpg.Connection)):
        raise TypeError(f"client must be an asyncpg Pool or Connection, not {type(client).__name__}")
    return _AsyncpgPool(client) if isinstance(client, asyncpg.Pool) else _AsyncpgConnection(client)


class _SQLAlchemy(sync_client.Client):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.joins_transactions = False

    def __repr__(self) -> str:  # without the URL: its query may hold a password
        return f"<SQLAlchemy client with driver {self._engine.driver}>"

    def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        with self._engine.connect() as connection:
            try:
                result = connection.execute(_text_clause(sql), _named_params(params))
            except Exception as error:
                if is_read_only(error):
                    connection.invalidate(error)
                raise
            return list(map(tuple, result)) if result.returns_rows else []

    def connect(self) -> psycopg.Connection[Row] | None:
        if self._engine.driver not in ("psycopg", "psycopg2"):
            return None
        pooled = self._engine.raw_connection()
        driver: Any = pooled.driver_connection
        if self._engine.driver == "psycopg":
            # The engine opens another one for its pool, with its events and functions, which may renew a password.
            pooled.detach()
            driver.set_autocommit(True)
            return cast("psycopg.Connection[Row]", driver)
        parameters = {**driver.info.dsn_parameters, "password": driver.info.password}
        pooled.close()
        return sync_connections.open_connection(_libpq_parameters(parameters))

    def is_recoverable(self, error: Exception) -> bool:
        return _engine_may_recover(error)


class _AsyncSQLAlchemy(async_client.AsyncClient):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.joins_transactions = False

    def __repr__(self) -> str:  # without the URL: its query may hold a password
        return f"<SQLAlchemy client with driver {self._engine.driver}>"

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        async with self._engine.connect() as connection:
            try:
                if self._engine.dialect.paramstyle == "numeric_dollar":  # asyncpg's; `text` may replace parts of names
                    result = await connection.exec_driver_sql(sql, tuple(params))
                else:
                    result = await connection.execute(_text_clause(sql), _named_params(params))
            except Exception as error:
                if is_read_only(error):
                    await connection.invalidate(error)
                raise
            return list(map(tuple, result)) if result.returns_rows else []

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        if self._engine.driver != "psycopg":
            return None
        pooled = await self._engine.raw_connection()
        driver = cast("psycopg.AsyncConnection[Row]", pooled.driver_connection)
        pooled.detach()
        await driver.set_autocommit(True)
        return driver

    def is_recoverable(self, error: Exception) -> bool:
        return _engine_may_recover(error)


class _Django(sync_client.Client):
    flavour_hint = (  # for the error of an asynchronous store
        "wrap_django() is for synchronous stores, since Django's connections are synchronous. Use "
        "async_stream_store() or async_conversation_store() of aibind_postgres.contrib.django, or a connection string"
    )

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._thread = threading.local()
        self.joins_transactions = True

    def __repr__(self) -> str:
        return f"<Django client of database {self._alias!r}>"

    @property
    def _wrapper(self) -> Any:
        return _django().connections[self._alias]

    def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        wrapper = self._wrapper
        try:
            with wrapper.cursor() as cursor:
                if params:
                    cursor.execute(_django_sql(sql), _named_params(params))
                else:
                    cursor.execute(sql)
                rows = cursor.fetchall() if cursor.description else []
        except _django().Error as error:
            if is_read_only(error) and not _in_transaction(wrapper):
                wrapper.connection.close()  # Django keeps the session otherwise, or returns it to its pool
            raise
        finally:
            # Django closes its connections at the end of a request, but only those of the threads that serve requests.
            if getattr(self._thread, "is_background", False) or _is_lost(wrapper):
                wrapper.close()
        return rows if wrapper.timezone is not None else [_with_timezone(row, wrapper.timezone_name) for row in rows]

    def connect(self) -> psycopg.Connection[Row] | None:
        self._thread.is_background = True  # only the thread of the listener calls this
        if is_testing_django():
            return None  # Django could not drop the test database while the connection is open
        wrapper = self._wrapper
        connection = sync_connections.open_connection(_libpq_parameters(wrapper.get_connection_params()))
        if role := wrapper.settings_dict["OPTIONS"].get("assume_role"):
            connection.execute(f"SET ROLE {quote(role)}")
        return connection

    def is_recoverable(self, error: Exception) -> bool:
        recoverable = is_recoverable(error, (_django().OperationalError, _django().InterfaceError))
        return recoverable and not _in_transaction(self._wrapper)

    def in_transaction(self) -> bool:
        return _in_transaction(self._wrapper)

    def capture_settings(self) -> Callable[[], None]:
        # Of django-tenants and similar packages, whose wrapper of each thread selects the schema.
        tenant = getattr(self._wrapper, "tenant", None)
        if tenant is None:
            return super().capture_settings()
        return _TenantSettings(self._alias, getattr(tenant, "schema_name", None) or id(tenant), tenant)

    def runs_inline(self) -> bool:
        # A block of the application inside that of a test is one that the producer would not see in production either.
        blocks = self._wrapper.atomic_blocks
        return bool(blocks) and blocks[-1]._from_testcase

    def release_thread(self) -> None:
        if not _in_transaction(self._wrapper):  # the connection of a test, whose thread runs the producer
            self._wrapper.close()


@dataclass(frozen=True)
class _TenantSettings:
    """Selects a tenant in the wrapper of the calling thread.

    Those of one schema are equal, so that one statement renews the leases of their writers. The objects of a tenant
    differ from request to request.
    """

    alias: str
    schema: object
    tenant: Any = field(compare=False)

    def __call__(self) -> None:
        _django().connections[self.alias].set_tenant(self.tenant)


class _AsyncpgPool(async_client.AsyncClient):
    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.joins_transactions = False

    def __repr__(self) -> str:
        return "<asyncpg client of a pool>"

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        try:
            return list(map(tuple, await self._pool.fetch(sql, *params)))
        except Exception as error:
            if is_read_only(error):
                await self._pool.expire_connections()
            raise

    def is_recoverable(self, error: Exception) -> bool:
        import asyncpg

        recoverable = is_recoverable(error, (*CONNECT_ERRORS, asyncpg.InterfaceError)) or _is_without_server(error)
        return recoverable and not isinstance(error, ValueError) and not self._pool.is_closing()


class _AsyncpgConnection(async_client.AsyncClient):
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()
        self.joins_transactions = True

    def __repr__(self) -> str:
        return "<asyncpg client of a connection>"

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Row]:
        async with self._lock:
            return list(map(tuple, await self._connection.fetch(sql, *params)))

    def is_recoverable(self, error: Exception) -> bool:
        return False

    def in_transaction(self) -> bool:
        return bool(self._connection.is_in_transaction())


def _django() -> Any:
    from django import db

    return db


def is_testing_django() -> bool:
    """Return True in a process that runs tests of Django, which have an outbox of mail."""
    from django.core import mail

    return hasattr(mail, "outbox")


def _with_placeholder(sql: str, placeholder: str) -> str:
    """Replace `$1` by a driver's placeholder, except in quoted names, literals and comments."""
    return _TOKENS.sub(lambda token: placeholder.format(token["number"]) if token["number"] else token[0], sql)


@lru_cache
def _text_clause(sql: str) -> TextClause:
    from sqlalchemy import text

    return text(_with_placeholder(sql.replace(":", "\\:"), ":aibind_{}"))


@lru_cache
def _django_sql(sql: str) -> str:
    return _with_placeholder(sql.replace("%", "%%"), "%(aibind_{})s")


def _named_params(params: Sequence[Any]) -> dict[str, Any]:
    # With some drivers, SQLAlchemy also replaces `%(name)s` in table names. The prefix is unlikely to occur there.
    return {f"aibind_{number}": value for number, value in enumerate(params, start=1)}


def _libpq_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    return {name: value for name, value in parameters.items() if name in known}


def _engine_may_recover(error: Exception) -> bool:
    from sqlalchemy import exc

    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    # SQLAlchemy does not wrap the errors that asyncpg raises while it connects.
    lost = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, *CONNECT_ERRORS)
    return is_recoverable(error, lost) or _is_without_server(error)


def _is_without_server(error: Exception) -> bool:
    """Return True for asyncpg's error if no host matches target_session_attrs, as during a failover."""
    return type(innermost(error)).__name__ == "TargetServerAttributeNotMatched"


def _in_transaction(wrapper: Any) -> bool:
    return bool(wrapper.in_atomic_block or (wrapper.connection is not None and not wrapper.autocommit))


def _is_lost(wrapper: Any) -> bool:
    return wrapper.connection is not None and wrapper.connection.closed and not _in_transaction(wrapper)


def _with_timezone(row: Row, zone: str) -> Row:
    # If USE_TZ is False, Django returns naive times in the time zone of the session.
    return tuple(value.replace(tzinfo=ZoneInfo(zone)) if isinstance(value, datetime) else value for value in row)
