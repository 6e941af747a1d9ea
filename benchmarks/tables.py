"""The tables of one benchmark, with stores, connections and pools for them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore, schema
from aibind_postgres._sql import StreamStatements
from aibind_postgres._tables import Table

TTL = 300_000  # milliseconds; the default of a store
LEASE = 15_000  # the same
POOL_SIZE = 10
RAW = {"autocommit": True, "cursor_factory": psycopg.RawCursor}
WITHOUT_0004 = "-- For chats:"  # the first words of that migration
WITHOUT_0005 = "-- For archiving finished streams:"
ASYNC_RAW = {"autocommit": True, "cursor_factory": psycopg.AsyncRawCursor}


class Names(TypedDict):
    """Table names as keyword arguments of a store and of `migrate`."""

    chunks_table: str
    status_table: str


class Tables(NamedTuple):
    """The tables of one benchmark. Can be pickled."""

    dsn: str
    schema: str

    def store(self, *, notify: bool = True) -> PostgresStreamStore:
        return PostgresStreamStore(self.dsn, **self.names, notify=notify)

    def async_store(self, *, notify: bool = True) -> AsyncPostgresStreamStore:
        return AsyncPostgresStreamStore(self.dsn, **self.names, notify=notify)

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, autocommit=True, cursor_factory=psycopg.RawCursor)

    async def async_connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self.dsn, autocommit=True, cursor_factory=psycopg.AsyncRawCursor)

    def pool(self) -> ConnectionPool[Any]:
        """Return a pool as an application would share it between threads."""
        return ConnectionPool(self.dsn, min_size=POOL_SIZE, max_size=POOL_SIZE, kwargs=RAW, open=True)

    def async_pool(self) -> AsyncConnectionPool[Any]:
        return AsyncConnectionPool(self.dsn, min_size=POOL_SIZE, max_size=POOL_SIZE, kwargs=ASYNC_RAW, open=False)

    @property
    def chunks(self) -> str:
        return f"{self.schema}.chunks"

    @property
    def archive(self) -> str:
        return f"{self.schema}.chunks_archive"

    @property
    def status(self) -> str:
        return f"{self.schema}.status"

    @property
    def conversations(self) -> str:
        return f"{self.schema}.conversations"

    @property
    def names(self) -> Names:
        return {"chunks_table": self.chunks, "status_table": self.status}

    @property
    def sql(self) -> StreamStatements:
        """The statements of the store."""
        return StreamStatements(Table.parse(self.chunks), Table.parse(self.status), lease=LEASE)

    def migrate(self, until: str | None = None) -> None:
        """Create the tables. `until` is a text in the migrations before which to stop; by default all are applied."""
        migrations = schema.render(**self.names, conversations_table=self.conversations)
        with psycopg.connect(self.dsn) as admin:
            admin.execute(f"CREATE SCHEMA {self.schema}")
            admin.execute(migrations if until is None else migrations[: migrations.index(until)])
