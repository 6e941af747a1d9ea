"""Wakes the subscriptions of this process after a change, and sends the notifications for other processes."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._notifications import encode_payloads
from .._sql import NOTIFY, json_array
from .._subscriptions import Subscriptions, wake_all
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT

if TYPE_CHECKING:
    from .client import AsyncClient

logger = logging.getLogger("aibind_postgres")

COOLDOWN_FACTOR = 30  # times the shorter of the last two sends: one that was delayed by chance does not count
MIN_COOLDOWN, MAX_COOLDOWN = 0.005, 0.1  # seconds


class AsyncNotifier:
    """Sends notifications after the commit and in the background.

    NOTIFY inside the transaction of an append would hold a lock of the whole server during its flush. The first change
    after a cooldown is sent at once. Changes during a send and the cooldown after it go out together, so sending takes
    a small part of the time, however many changes there are. A client whose statements join a transaction of the caller
    sends at once instead, and PostgreSQL delivers the notification when that transaction commits.
    """

    def __init__(self, client: AsyncClient, subscriptions: Subscriptions, channel: str) -> None:
        self.channel = channel
        self._client = client
        self._subscriptions = subscriptions
        self._instance = uuid.uuid4().hex
        self._mutex = Mutex()
        self._pending: dict[str, None] = {}
        self._filled = AsyncEvent()
        self._closing = AsyncEvent()
        self._worker: AsyncWorker | None = None

    @property
    def sender(self) -> str:
        """The name of this store in payloads; it differs in a forked process."""
        return f"{self._instance}/{os.getpid()}"

    async def changed(self, stream_ids: Collection[str]) -> None:
        """Wake the subscriptions of streams that have changed here, and notify other processes."""
        wake_all(self._subscriptions.changed(stream_ids))
        await self._notify(stream_ids)

    async def deleted(self, stream_id: str) -> None:
        """End the subscriptions of a stream that was deleted here, and notify other processes."""
        wake_all(self._subscriptions.deleted(stream_id))
        await self._notify([stream_id])

    async def appended(self, appended: Collection[tuple[str, int, Sequence[str]]]) -> None:
        """Pass on texts that were appended here: stream ids, the numbers before them, and the texts."""
        wake_all(self._subscriptions.appended(appended))
        await self._notify([stream_id for stream_id, _, _ in appended])

    async def close(self) -> None:
        """Send the pending notifications and end the worker."""
        with self._mutex:
            self._closing.set()
            self._filled.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _notify(self, stream_ids: Iterable[str]) -> None:
        """Send, or queue to be sent.

        Only a client that joins a transaction of the caller raises, since there a failed NOTIFY has undone the change.
        Elsewhere the poll of other processes finds changes without a notification.
        """
        if self._client.joins_transactions:
            await self._send(stream_ids, None)
            return
        with self._mutex:
            if not self._pending:
                self._filled.set()
            self._pending.update(dict.fromkeys(stream_ids))
            if self._worker is None or not self._worker.is_alive():
                with suppress(RuntimeError):  # no thread can start while the interpreter exits
                    self._worker = async_spawn(self._work, "aibind_postgres-notifier")

    async def _work(self) -> None:
        taken = math.inf
        while True:
            await self._filled.wait(0 if self._closing.is_set() else WORKER_IDLE_TIMEOUT)
            with self._mutex:
                self._filled.clear()
                batch, self._pending = self._pending, {}
                if not batch:
                    self._worker = None
                    return
            started = monotonic()
            try:
                await self._send(batch, self.sender)
            except Exception as error:
                logger.debug("a notification for %d streams was not sent: %s", len(batch), type(error).__name__)
            taken, taken_before = monotonic() - started, taken
            cooldown = COOLDOWN_FACTOR * min(taken, taken_before)
            await self._closing.wait(min(max(cooldown, MIN_COOLDOWN), MAX_COOLDOWN))

    async def _send(self, stream_ids: Iterable[str], sender: str | None) -> None:
        payloads = json_array(encode_payloads(stream_ids, sender))
        await self._client.query(NOTIFY, [self.channel, payloads])
