"""The methods of both stores for monitoring: `check` and `get_stats`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from .. import _arguments as arguments
from .._tables import Table
from ..models import StoreCheck
from .database import AsyncDatabase
from .readiness import check_readiness


class AsyncObservedStore:
    """The methods of both stores for monitoring. Subclasses set the attributes."""

    _database: AsyncDatabase
    _required_tables: Sequence[Table]  # those that must exist

    async def check(self, timeout: float | timedelta = 2.0) -> StoreCheck:
        """Check the connection and the tables, for readiness probes, with one query on the catalogs.

        An unreachable server, a missing table and a missing privilege are results, not errors. Call this outside a
        transaction, which a missing privilege on a schema would abort.

        Args:
            timeout: Seconds, or a timedelta, to wait for a connection of the pool and for the answer; 2 by default. A
                pool then tries once more on a new connection, which may take two more times as long. The first
                connection of a store is limited by `connect_timeout` of the connection string instead. A single
                connection and other drivers have their own limits.

        Returns:
            Whether the store is ready, and why not.

        Raises:
            ValueError: `timeout` is not positive.
            TypeError: `timeout` is neither a number nor a timedelta.
        """
        return await check_readiness(self._database, self._required_tables, arguments.seconds(timeout, "timeout"))

    def get_stats(self) -> dict[str, int]:
        """Return the current measures of this store, and its counters since it was made, as psycopg's pools do.

        The call sends no statement. It works in any thread, and on a closed store. docs/operations.md describes the
        names under "Statistics".

        Returns:
            The numbers by their names. If the store owns its pool, they include those of the pool's `get_stats`.

        Raises:
            ForkedError: The process was forked after the first call.
        """
        self._database.check_process()
        return {**self._database.get_stats(), **self._own_stats()}

    def _own_stats(self) -> dict[str, int]:
        """Return the numbers that only this kind of store has."""
        return {}
