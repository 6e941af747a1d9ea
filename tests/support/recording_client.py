"""Clients that record the reads of streams, in both flavours: psycopg pools with LISTEN and everything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from threading import Lock
from time import monotonic
from typing import Any

from aibind_postgres._async.client import AsyncPoolClient
from aibind_postgres._stream_tail import LIVE_PAGE_CHUNKS
from aibind_postgres._sync.client import PoolClient


class Recording:
    """The reads so far. `read_error` is raised instead of further reads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reads: list[str] = []  # stream ids of readers that caught up on their own
        self.fetches: list[list[str]] = []  # stream ids of each statement that served waiting readers
        self.connections = 0  # opened to LISTEN
        self.read_error: Exception | None = None
        self._mutex = Lock()
        self._reads_running = 0
        self._last_read_at = 0.0

    def is_quiet(self, seconds: float = 0.05) -> bool:
        """Return whether the listener has connected, and nothing was read for a while: all readers wait."""
        return self.connections > 0 and self._reads_running == 0 and monotonic() - self._last_read_at > seconds

    def _begin(self, sql: str, params: Sequence[Any]) -> bool:
        if "-greatest(total_chunks" not in sql:
            return False
        if self.read_error is not None:
            raise self.read_error
        if "json_to_recordset" in sql:
            self.fetches.append([item["id"] for item in json.loads(params[0])])
        elif params[2] == LIVE_PAGE_CHUNKS:
            self.fetches.append([params[0]])
        else:
            self.reads.append(params[0])
        with self._mutex:
            self._reads_running += 1
        return True

    def _end(self) -> None:
        with self._mutex:
            self._reads_running -= 1
        self._last_read_at = monotonic()

    def _record_connection(self) -> None:
        self.connections += 1
        self._last_read_at = monotonic()


class AsyncRecordingClient(Recording, AsyncPoolClient):
    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Any]:
        is_read = self._begin(sql, params)
        try:
            return await super().query(sql, params)
        finally:
            if is_read:
                self._end()

    async def connect(self) -> Any:
        connection = await super().connect()
        self._record_connection()
        return connection


class RecordingClient(Recording, PoolClient):
    def query(self, sql: str, params: Sequence[Any]) -> Sequence[Any]:
        is_read = self._begin(sql, params)
        try:
            return super().query(sql, params)
        finally:
            if is_read:
                self._end()

    def connect(self) -> Any:
        connection = super().connect()
        self._record_connection()
        return connection
