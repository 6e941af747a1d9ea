"""The client of a store: the protocol for other drivers, and the interface that stores use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import psycopg

from .._sqlstate import is_recoverable
from .._statement_runner import Row


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

    async def query_within(self, sql: str, params: Sequence[Any], timeout: float) -> Sequence[Row]:
        """Run one statement that may run twice. A psycopg pool repeats it on a new connection, once.

        Args:
            sql: The statement, with numbered parameters.
            params: The values of the parameters.
            timeout: Seconds to wait for each of the two connections. Other drivers have their own time limits.
        """
        return await self.query(sql, params)

    async def connect(self) -> psycopg.AsyncConnection[Row] | None:
        """Open another connection to the same database, in autocommit mode. Return None if this is not possible."""
        return None

    def is_recoverable(self, error: Exception) -> bool:
        """Return True if the same statement may succeed later, on another connection."""
        listed = isinstance(error, self._connection_errors)
        return listed or (not self.joins_transactions and is_recoverable(error))

    def is_unavailable(self, error: Exception) -> bool:
        """Return True if the database cannot be used at the moment, whether or not a retry makes sense here."""
        return self.is_recoverable(error)

    def in_transaction(self) -> bool:
        """Return True if the caller can still roll back the last statement."""
        return self.joins_transactions

    def capture_settings(self) -> Callable[[], None]:
        """Return a function that copies the settings of this thread, such as a tenant, to the thread that calls it.

        Writers and producers call it in their workers.
        """
        return _do_nothing

    def get_stats(self) -> dict[str, int]:
        """Return the statistics of the pool that this client owns, or none."""
        return {}

    async def runs_inline(self) -> bool:
        """Return True if a producer must run inside the call that starts it, as in the transaction of a test."""
        return False

    async def keep(self, most: int) -> None:
        """Keep up to `most` connections between statements, if they are of a pool that this client owns."""

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
