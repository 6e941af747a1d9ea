"""Read pages of stored chunks from a replica. `_replica` decides which of them are used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from .._conninfo import with_defaults
from .._replica import Identity, Outages, has_stream, page_of_replica
from .._sqlstate import server_reason, sqlstate
from .psycopg_clients import as_client

if TYPE_CHECKING:
    from types import TracebackType

    from .._statement_runner import Row
    from .database import AsyncDatabase
    from .psycopg_clients import AsyncClientLike
    from .stream_schema import AsyncStreamSchema

logger = logging.getLogger("aibind_postgres.replica")

ANSWER_TIMEOUT = 2.0  # seconds for a page, including the wait for a connection; then the primary is asked
CONNECT_TIMEOUT = "2"  # seconds, libpq's minimum, unless the connection string sets it

USELESS = "its pages are not those of the primary: it lags behind, or is not a replica of the primary"


class AsyncReplica:
    """The replica of one store. It never causes an error: pages that it cannot give are read from the primary.

    Args:
        client: The client of the replica, as the first argument of a store.
        database: The database of the store.
        schema: The statements of the store.
        timeout: The time limit of the store for the answer to a statement, in seconds; infinity if there is none.
    """

    def __init__(
        self,
        client: AsyncClientLike,
        database: AsyncDatabase,
        schema: AsyncStreamSchema,
        timeout: float,
    ) -> None:
        if isinstance(client, str):
            client = with_defaults(client, connect_timeout=CONNECT_TIMEOUT)
        has_timeout = isinstance(client, (str, AsyncConnectionPool, psycopg.AsyncConnection))
        self.client = as_client(client, min(timeout, ANSWER_TIMEOUT) if has_timeout else None)
        database.add_client(self.client)
        self._database = database
        self._schema = schema
        self._outages = Outages()
        self._warned_of_lag = False

    async def query(self, statement: str, params: Sequence[Any]) -> Sequence[Row]:
        """Return the rows of a statement that reads a page, from the replica if it has the page.

        The status is that of the primary before the page was read.

        Args:
            statement: READ, READ_TIMED, or READ_ARCHIVED with times or without.
            params: The id of the stream, the sequence number before the page, and the number of sequence numbers.

        Raises:
            Exception: The errors of the primary.
        """
        _, after, limit = params
        # The replica has no changes of an open transaction of the caller.
        if self._database.client.in_transaction():
            return await self._database.query(statement, params)
        # The times of migration 0002 identify a stream.
        if not self._outages.is_over(monotonic()) or not await self._schema.has_times():
            return await self._database.query(statement, params)
        statements = self._schema.statements
        rows = sorted(await self._database.query(statements.origin, params), key=itemgetter(0))
        if not rows or rows[0][0] > 0:
            return []
        origin = Identity.parse(rows[0])
        archived = statement not in (statements.read, statements.read_timed)
        if origin.is_complete(after, limit) and not archived:
            page = [(*origin.status_row, None), *rows[1:]]
            return page if statement != statements.read else [row[:2] for row in page]
        del rows
        own = statements.of_replica(statement) if origin.is_known else None
        found = None if own is None else await self._query_replica(own, params, origin, archived)
        return await self._database.query(statement, params) if found is None else found

    async def _query_replica(
        self, statement: str, params: Sequence[Any], origin: Identity, archived: bool
    ) -> Sequence[Row] | None:
        _, after, limit = params
        started = monotonic()
        if not self._outages.may_ask(started):
            return None
        try:
            rows = await self.client.query(statement, params)
            rows = sorted(rows, key=itemgetter(0))
            found = page_of_replica(origin, rows, after, limit, archived=archived)
            is_copy = has_stream(origin, rows)
        except Exception as error:
            if self._database.closing.is_set():
                return None
            code = sqlstate(error) or ""
            reason = server_reason(error) or " ".join(filter(None, [type(error).__name__, code]))
            # A conflict with the recovery of a standby ends one statement.
            record = self._outages.refused if code.startswith("40") else self._outages.failed
            self._warn(record(started, monotonic()), reason)
            return None
        if not is_copy:
            begins = self._outages.refused(started, monotonic())
            self._warn(begins and not self._warned_of_lag, USELESS)  # a lag may come and go
            self._warned_of_lag = self._warned_of_lag or begins
        elif self._outages.succeeded(started):
            logger.info("replica available again")
        return found

    def _warn(self, begins: bool, reason: str) -> None:
        """Warn at the beginning of an outage. A single page that the replica lacks is not worth a warning."""
        logger.log(
            logging.WARNING if begins else logging.DEBUG,
            "replica unavailable: %s. Stored chunks are read from the primary until it can be used again",
            reason,
        )

    async def __aenter__(self) -> AsyncReplica:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections that the store has opened for the replica."""
        await self.client.close()
