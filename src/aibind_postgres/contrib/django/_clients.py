"""The clients of stores on a database of DATABASES: pools, and the connection of a test inside its transaction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections
from psycopg.conninfo import make_conninfo

from ... import _arguments as arguments
from ..._async import psycopg_clients as async_clients
from ..._conninfo import with_defaults
from ..._statement_runner import Row
from ..._sync import psycopg_clients as sync_clients
from ...adapters import _Django, _libpq_parameters, is_testing_django


def connection_string(alias: str) -> str:
    """Return the connection string with which Django connects to a database now. It contains the password.

    Raises:
        django.db.utils.ConnectionDoesNotExist: The alias is unknown.
        TypeError: The database is not PostgreSQL.
    """
    wrapper = connections[alias]
    if wrapper.vendor != "postgresql":
        raise TypeError(f"Django's database {alias!r} must have the vendor postgresql, not {wrapper.vendor}")
    parameters = _libpq_parameters(wrapper.get_connection_params())
    if role := wrapper.settings_dict["OPTIONS"].get("assume_role"):
        escaped = role.replace("\\", "\\\\").replace(" ", "\\ ")
        parameters["options"] = f"{parameters.get('options', '')} -c role={escaped}".strip()
    return with_defaults(make_conninfo("", **parameters))


def in_test(alias: str) -> bool:
    """Return True if the thread is in the transaction that Django's `TestCase` opens around each test."""
    # Otherwise, a thread need not have a connection of Django.
    return is_testing_django() and any(block._from_testcase for block in connections[alias].atomic_blocks)


def refuse_forbidden(alias: str) -> None:
    """Raise in a test that may not use a database, such as a `SimpleTestCase`.

    Without other tests, Django creates no test database, and the pool would connect to that of the application.
    """
    wrapper = connections[alias]
    if hasattr(wrapper.connect, "wrapped"):  # replaced by Django with a method that raises
        wrapper.connect()
    if wrapper.ensure_connection.__module__.startswith("pytest_django"):  # replaced in the same way
        wrapper.ensure_connection()


def in_any_test() -> bool:
    """Return True if the thread is in such a transaction of any database."""
    return any(in_test(wrapper.alias) for wrapper in connections.all(initialized_only=True))


class DjangoPoolClient(sync_clients.PoolClient):
    """The client of a synchronous store."""

    def __init__(self, alias: str, timeout: float | timedelta | None) -> None:
        super().__init__(_make_pool(sync_clients, alias), _seconds(timeout), owned=True)
        self._alias = alias
        self._test = _Django(alias)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of database {self._alias!r}>"

    @property
    def joins_transactions(self) -> bool:  # type: ignore[override]  # an attribute of other clients
        return in_test(self._alias)

    def query(self, sql: str, params: Sequence[Any], timeout: float = math.inf) -> Sequence[Row]:
        if in_test(self._alias):
            return self._test.query(sql, params)
        if is_testing_django():
            refuse_forbidden(self._alias)
        return super().query(sql, params, timeout)

    def is_recoverable(self, error: Exception) -> bool:
        return not in_test(self._alias) and super().is_recoverable(error)

    def runs_inline(self) -> bool:
        return in_test(self._alias)


class AsyncDjangoPoolClient(async_clients.AsyncPoolClient):
    """The client of an asynchronous store. In a test, `sync_to_async` runs its statements in the thread of the test."""

    def __init__(self, alias: str, timeout: float | timedelta | None) -> None:
        super().__init__(_make_pool(async_clients, alias), _seconds(timeout), owned=True)
        self._alias = alias
        self._test = _Django(alias)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of database {self._alias!r}>"

    async def query(self, sql: str, params: Sequence[Any], timeout: float = math.inf) -> Sequence[Row]:
        if is_testing_django():
            rows = await sync_to_async(self._query_in_test)(sql, params)
            if rows is not None:
                return rows
        return await super().query(sql, params, timeout)

    def _query_in_test(self, sql: str, params: Sequence[Any]) -> Sequence[Row] | None:
        if in_test(self._alias):
            return self._test.query(sql, params)
        refuse_forbidden(self._alias)
        return None

    async def runs_inline(self) -> bool:
        return is_testing_django() and await sync_to_async(in_test)(self._alias)


def _make_pool(clients: Any, alias: str) -> Any:
    # Asked for each connection: a test has another database, and a backend may renew its password.
    return clients.make_pool(lambda: connection_string(alias))


def _seconds(timeout: float | timedelta | None) -> float | None:
    return None if timeout is None else arguments.seconds(timeout, "timeout")
