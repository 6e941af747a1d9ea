"""Renew the leases of the streams that this process writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._leases import RENEWALS
from .._sql import json_array
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .database import AsyncDatabase
    from .stream_schema import AsyncStreamSchema

logger = logging.getLogger("aibind_postgres")

RETRY_PAUSE = 0.5  # seconds after a renewal that failed


class AsyncLeaseKeeper:
    """Runs the worker that renews the leases of the writers of one store, with one statement for all of them.

    Writers that need different settings of their threads, such as tenants, get a statement each.
    """

    def __init__(self, database: AsyncDatabase, schema: AsyncStreamSchema, lease: int) -> None:
        self._database = database
        self._schema = schema
        self._interval = lease / 1000 / RENEWALS
        self._mutex = Mutex()
        self._held: dict[Callable[[], None], list[str]] = {}  # stream ids by the settings to apply
        self._worker: AsyncWorker | None = None
        self._closing = AsyncEvent()

    @contextmanager
    def held(self, stream_id: str, apply_settings: Callable[[], None]) -> Iterator[None]:
        """Return a context manager inside which the lease of a stream is renewed, if the schema has leases."""
        if not self._schema.has_leases:
            yield
            return
        with self._mutex:
            self._held.setdefault(apply_settings, []).append(stream_id)
        try:
            with self._mutex:
                if self._worker is None or not self._worker.is_alive():
                    self._worker = async_spawn(self._work, "aibind_postgres-leases")
            yield
        finally:
            with self._mutex:
                self._held[apply_settings].remove(stream_id)
                if not self._held[apply_settings]:
                    del self._held[apply_settings]

    async def close(self) -> None:
        """End the worker."""
        with self._mutex:
            self._closing.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _work(self) -> None:
        last_held_at = monotonic()
        pause = self._interval
        while not await self._closing.wait(pause):
            with self._mutex:
                held = [(apply_settings, list(stream_ids)) for apply_settings, stream_ids in self._held.items()]
                if held:
                    last_held_at = monotonic()
                elif monotonic() - last_held_at > WORKER_IDLE_TIMEOUT:
                    self._worker = None
                    break
            started = monotonic()
            failed = False
            for apply_settings, stream_ids in held:
                try:
                    apply_settings()
                    await self._database.query(self._schema.statements.renew_leases, [json_array(stream_ids)])
                except Exception as error:  # the others are renewed all the same
                    failed = True
                    logger.debug("the leases could not be renewed: %s", type(error).__name__)
            # After a failure, the renewal is the first thing when the server is reachable again.
            pause = RETRY_PAUSE if failed else self._interval - (monotonic() - started)
            pause = min(max(0.0, pause), self._interval)
        await self._database.client.release_thread()
