"""A producer whose thread starts late and does not see its stream, while a reader already reads it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool
from support.concurrency import Background, until

from aibind_postgres import AibindError, DurableStream, PostgresStreamStore
from aibind_postgres._subscriptions import Subscriptions

ERROR = "not found by its producer"


class TwoSessions:
    """A client whose sessions see different rows: the thread of the producer sees no stream."""

    joins_transactions = True

    def __init__(self, pool: ConnectionPool[Any], caplog: pytest.LogCaptureFixture) -> None:
        self._pool = pool
        self._caplog = caplog
        self.producer_may_start = threading.Event()

    def query(self, sql: str, params: Sequence[Any]) -> list[Any]:
        if sql.lstrip().startswith(("SELECT state, error", "WITH taken AS")):  # the producer asks for the status
            return []
        with self._pool.connection() as connection:
            cursor = psycopg.RawCursor(connection).execute(sql, params)
            rows = cursor.fetchall() if cursor.description else []
        if "UNION ALL" in sql and not self.producer_may_start.is_set():  # the first page of the reader
            self.producer_may_start.set()
            until(lambda: ERROR in self._caplog.text)
        return rows


def test_reader_gets_the_error_of_a_late_producer(dsn, tables, caplog, monkeypatch):
    subscribe = Subscriptions.subscribe

    def subscribe_late(self: Subscriptions, *args: Any, ends_only: bool = False) -> Any:
        if ends_only:
            assert client.producer_may_start.wait(20)
        return subscribe(self, *args, ends_only=ends_only)

    monkeypatch.setattr(Subscriptions, "subscribe", subscribe_late)
    with ConnectionPool(dsn, open=True) as pool:
        client = TwoSessions(pool, caplog)
        with PostgresStreamStore(client, **tables) as store:
            stream = DurableStream.start(store, iter(["a"]))
            with Background(lambda: list(stream.sse())) as reader, pytest.raises(AibindError, match=ERROR):
                reader.result(20)
