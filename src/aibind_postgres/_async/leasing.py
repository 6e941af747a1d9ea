"""Leases: give and renew those of the streams that this process writes, and end streams with expired leases."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_after_cancellation, async_spawn
from .._deletion import MAX_ROWS
from .._leases import EXPIRED_TEXT, RENEWALS, renewal_timeout
from .._sql import json_array
from ..metrics import LEASES_EXPIRED
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .columns import AsyncQuery
    from .database import AsyncDatabase
    from .stream_schema import AsyncStreamSchema

logger = logging.getLogger("aibind_postgres.leases")

RETRY_PAUSE = 0.5  # seconds after a renewal that failed
RESTART_PAUSE = 1.0  # seconds after which a worker that was cancelled is replaced


class AsyncLeases:
    """The leases of one store.

    A worker renews the leases of all writers with one statement. If writers depend on settings of their threads, such
    as the tenant, it sends one statement for each setting.

    Args:
        database: The database of the store.
        schema: The statements of the store.
        lease: Milliseconds from a renewal to the expiry of a lease.
        ttl: Milliseconds for which an ended stream is kept.
    """

    def __init__(self, database: AsyncDatabase, schema: AsyncStreamSchema, lease: int, ttl: int) -> None:
        self._database = database
        self._schema = schema
        self._ttl = ttl
        self._interval = lease / 1000 / RENEWALS
        self._timeout = renewal_timeout(lease / 1000)
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
            self._ensure_worker()
            yield
        finally:
            with self._mutex:
                self._held[apply_settings].remove(stream_id)
                if not self._held[apply_settings]:
                    del self._held[apply_settings]

    def _ensure_worker(self) -> None:
        """Start a worker if there are leases to renew, and none runs. The previous one may have been cancelled."""
        with self._mutex:
            if not self._held or self._closing.is_set() or (self._worker is not None and self._worker.is_alive()):
                return
            self._worker = async_spawn(self._work, "aibind_postgres-leases")
            async_after_cancellation(self._worker, self._ensure_worker, RESTART_PAUSE)

    async def take(self, stream_id: str, renewed: bool) -> Sequence[Row]:
        """Give a stream a lease for its new writer, or remove it if it will not be `renewed`. Return the status row."""
        # The migration may have been applied since the last look-up, and another process may have given a lease.
        statements = await self._schema.look_up(again=True)
        statement = statements.status
        if self._schema.has_leases:
            statement = statements.take_lease if renewed else statements.drop_lease
        return await self._database.query(statement, [stream_id])

    async def end_expired(self, stream_ids: Sequence[str], query: AsyncQuery | None = None) -> list[str]:
        """End the given streams whose lease has expired, and return their ids.

        Args:
            stream_ids: The ids of the streams.
            query: Runs the statement. Default: the client of the store.
        """
        ended = await self._end_expired(stream_ids, query or self._database.query)
        self._database.count(LEASES_EXPIRED, len(ended))
        return ended

    async def _end_expired(self, stream_ids: Sequence[str], run: AsyncQuery) -> list[str]:
        statements = self._schema.statements
        if not self._database.is_distributed:
            try:
                rows = await run(statements.end_expired, [json_array(stream_ids), EXPIRED_TEXT, self._ttl])
                return [stream_id for (stream_id,) in rows]
            except Exception as error:
                if not self._database.refuses(error):
                    raise
        ended: list[str] = []
        for stream_id in stream_ids:
            rows = await run(statements.end_expired_distributed, [stream_id, EXPIRED_TEXT, self._ttl])
            ended += [ended_id for (ended_id,) in rows]
        return ended

    async def end_if_expired(self, stream_ids: Sequence[str]) -> list[str]:
        """End the given streams with an expired lease, if this process may, and return their ids.

        Return none after an error, such as for a role without the privilege: other processes end the streams. In a
        transaction of the caller, do not try, since an error would abort the transaction.
        """
        if self._database.client.in_transaction() or not self._database.contact.is_steady(monotonic()):
            return []
        try:
            statements = await self._schema.look_up()
            rows = await self._database.query(statements.poll, [json_array(stream_ids)])
            expired = [row[0] for row in rows if row[3]]
            return await self.end_expired(expired) if expired else []
        except Exception as error:
            logger.debug("streams with an expired lease could not be ended: %s", type(error).__name__)
            return []

    async def end_all_expired(self) -> AsyncIterator[list[str]]:
        """End all streams with an expired lease. Yield the ids after each statement."""
        last = ""
        while self._schema.has_leases:
            rows = await self._database.query(self._schema.statements.expired, [last, MAX_ROWS])
            if not rows:
                return
            await self._wait_for_contact()
            last = rows[-1][0]
            if ended := await self.end_expired([stream_id for (stream_id,) in rows]):
                yield ended

    async def _wait_for_contact(self) -> None:
        """Wait until expired leases cannot be due to an outage of the server."""
        while not self._database.contact.is_steady(monotonic()):
            await self._database.sleep(1.0)
            await self._database.query(self._schema.statements.expired, ["", 1])

    async def _renew_held(self, stream_ids: Sequence[str]) -> None:
        """Renew leases in one statement. If the tables are distributed, in one for each stream."""
        statements = self._schema.statements
        if not self._database.is_distributed:
            try:
                await self._database.query(statements.renew_leases, [json_array(stream_ids)], self._timeout)
                return
            except Exception as error:
                if not self._database.refuses(error):
                    raise
        for stream_id in stream_ids:
            await self._database.query(statements.take_lease, [stream_id], self._timeout)

    async def close(self) -> None:
        """End the worker."""
        with self._mutex:
            self._closing.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _work(self) -> None:
        try:
            await self._renew()
        finally:
            await self._database.client.release_thread()

    async def _renew(self) -> None:
        last_held_at = monotonic()
        pause = self._interval
        while not await self._closing.wait(pause):
            with self._mutex:
                held = [(apply_settings, list(stream_ids)) for apply_settings, stream_ids in self._held.items()]
                if held:
                    last_held_at = monotonic()
                elif monotonic() - last_held_at > WORKER_IDLE_TIMEOUT:
                    self._worker = None
                    return
            started = monotonic()
            failed = False
            for apply_settings, stream_ids in held:
                try:
                    apply_settings()
                    await self._renew_held(stream_ids)
                except Exception as error:  # the other leases are still renewed
                    failed = True
                    logger.debug("the leases could not be renewed: %s", type(error).__name__)
            # After a failure, retry soon: leases must be renewed shortly after the end of an outage.
            pause = RETRY_PAUSE if failed else self._interval - (monotonic() - started)
            pause = min(max(0.0, pause), self._interval)
