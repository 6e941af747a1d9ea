"""Who waits for which stream, and what wakes them: announcements, and a poll as the safety net."""

from __future__ import annotations

import logging
import math
import os
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from .._sql import ANNOUNCE, announced, announcements, json_array
from .._tables import quote
from .client import is_direct

if TYPE_CHECKING:
    from typing_extensions import Self

    from .client import AsyncClient, Row

logger = logging.getLogger("aibind_postgres")

LINGER = 30.0  # seconds that a worker with nothing to do stays, before it ends and closes its connection
PROBE_TIMEOUT = 2.0  # seconds in which an announcement to oneself must have arrived
LONGEST_PAUSE = 10  # times poll_interval: what polling backs off to while it finds nothing
LONGEST_RETRY = 5.0  # seconds between two polls while they fail
FIRST_RECONNECT, LONGEST_RECONNECT = 0.1, 30.0  # seconds between two attempts to connect, doubled each time
CLOSING_TIMEOUT = 10.0  # seconds that closing waits for a worker


class AsyncPlace:
    """One reader's place among those who wait for a stream. Take it with `with`, and look only then.

    While the reader waits, `cursor` is the number of the last chunk it has; otherwise it is None.
    """

    def __init__(self, changes: AsyncChanges, stream_id: str) -> None:
        self.stream_id = stream_id
        self.cursor: float | None = None
        self._changes = changes
        self._woken = AsyncEvent()
        self._polled: object = None

    def __enter__(self) -> Self:
        self._changes.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._changes.leave(self)

    def about_to_look(self) -> None:
        """Forget earlier wake-ups: what happens from here on wakes the next `wait`."""
        self._woken.clear()

    async def wait(self, cursor: float, timeout: float | None = None) -> bool:
        """Wait until there may be something after `cursor`; return False if `timeout` seconds went by first.

        A cursor of infinity waits for the end of the stream; announced chunks wake it all the same.
        """
        self.cursor = cursor
        try:
            self._changes.keep_watch()
            return await self._woken.wait(timeout)
        finally:
            self.cursor = None

    def wake(self) -> None:
        self._woken.set()

    def wake_if_behind(self, state: str | None, total_chunks: int) -> bool:
        """Wake a waiting reader for what a poll has found, and say whether that is news; no state: no such stream.

        A reader that has looked because of the same finding and still waits is not sent to look again: it may see
        other rows than the poll does, or a row may be missing.
        """
        found = (self.cursor, state, total_chunks)
        if self.cursor is None or self._woken.is_set() or found == self._polled:
            return False
        if state == "active" and total_chunks <= self.cursor:
            return False
        self._polled = found
        self._woken.set()
        return True


class AsyncChanges:
    """The waiting readers of one store. While there are any, a watch looks out for them."""

    def __init__(self, client: AsyncClient, channel: str, poll_statement: str, poll_interval: float) -> None:
        self.client = client
        self.channel = channel
        self.poll_statement = poll_statement
        self.poll_interval = poll_interval
        self.closing = AsyncEvent()
        self._mutex = Mutex()
        self._places: dict[str, set[AsyncPlace]] = {}
        self._left: deque[AsyncPlace] = deque()
        self._watch: AsyncWatch | None = None
        self._known_deaf = False
        self._name = uuid.uuid4().hex

    @property
    def name(self) -> str:
        """What tells this store's own announcements from others. A process that was forked has another name."""
        return f"{self._name}/{os.getpid()}"

    def place(self, stream_id: str) -> AsyncPlace:
        return AsyncPlace(self, stream_id)

    def enter(self, place: AsyncPlace) -> None:
        with self._mutex:
            self._clear_left()
            self._places.setdefault(place.stream_id, set()).add(place)

    def leave(self, place: AsyncPlace) -> None:
        # Without the mutex: the garbage collector closes forgotten readers, in any thread and at any moment, also in
        # one that holds it.
        self._left.append(place)

    def _clear_left(self) -> None:
        while self._left:
            place = self._left.popleft()
            places = self._places[place.stream_id]
            places.discard(place)
            if not places:
                del self._places[place.stream_id]

    def wake(self, stream_ids: Iterable[str] | None = None) -> None:
        """Wake the readers of these streams, or all."""
        with self._mutex:
            for stream_id in list(self._places) if stream_ids is None else stream_ids:
                for place in self._places.get(stream_id, ()):
                    place.wake()

    def waiting(self) -> list[AsyncPlace]:
        """Return the places of those who are waiting just now."""
        with self._mutex:
            self._clear_left()
            return [place for places in self._places.values() for place in places if place.cursor is not None]

    def keep_watch(self) -> None:
        """See to it that somebody is looking out."""
        with self._mutex:
            if self._watch is None and not self.closing.is_set():
                self._watch = AsyncWatch(self)

    def end_watch(self, watch: AsyncWatch, *, if_idle: bool) -> bool:
        """Let a watch go: the next reader who waits starts another. With `if_idle`, only if there is no reader."""
        with self._mutex:
            self._clear_left()
            if if_idle and self._places:
                return False
            if self._watch is watch:
                self._watch = None
            return True

    def warn_of_deafness(self) -> None:
        if not self._known_deaf:
            self._known_deaf = True
            logger.warning(
                "announcements do not arrive on this connection, as behind a transaction pooler: "
                "readers are woken by polling, every %g to %g seconds",
                self.poll_interval,
                LONGEST_PAUSE * self.poll_interval,
            )

    async def close(self) -> None:
        """Wake everybody for the last time and end the watch."""
        self.closing.set()
        self.wake()
        with self._mutex:
            watch = self._watch
        if watch is not None:
            await watch.close()


class AsyncWatch:
    """The worker that looks out for waiting readers: on a connection of its own for announcements, and by polling.

    It ends when there has been no reader for a while.
    """

    def __init__(self, changes: AsyncChanges) -> None:
        self._changes = changes
        self._client = changes.client
        self._mutex = Mutex()
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self._unheard_since = math.inf  # when a probe was sent that has not been heard yet
        self._connect_at = 0.0
        self._reconnect_pause = FIRST_RECONNECT
        self._worker = async_spawn(self._run, "aibind_postgres-watch")

    async def close(self) -> None:
        with self._mutex:
            if self._connection is not None:
                _hang_up(self._connection)
        await self._worker.join(CLOSING_TIMEOUT)

    async def _run(self) -> None:
        changes = self._changes
        pause = changes.poll_interval
        busy_at = polled_at = monotonic()
        try:
            while not changes.closing.is_set():
                if changes.waiting():
                    busy_at = monotonic()
                elif monotonic() - busy_at > LINGER and changes.end_watch(self, if_idle=True):
                    return
                if self._connection is None and monotonic() >= self._connect_at:
                    await self._connect()
                try:
                    await self._listen(min(pause, LINGER))
                    if monotonic() - polled_at < pause:
                        continue
                    polled_at = monotonic()
                    news = await self._poll()
                except Exception as error:
                    if changes.closing.is_set():
                        return
                    # Whatever it is: the readers look for themselves, and meet it where it can be raised.
                    logger.debug("looking out for changes failed: %s", type(error).__name__)
                    if self._connection is not None and self._connection.closed:
                        await self._disconnect()
                    pause = min(pause * 2, max(LONGEST_RETRY, changes.poll_interval))
                    changes.wake()
                else:
                    pause = changes.poll_interval if news else min(pause * 1.5, LONGEST_PAUSE * changes.poll_interval)
        finally:
            changes.end_watch(self, if_idle=False)
            changes.wake()  # whoever still waits looks, and starts another watch
            await self._disconnect()

    async def _connect(self) -> None:
        self._connect_at = monotonic() + self._reconnect_pause
        self._reconnect_pause = min(self._reconnect_pause * 2, LONGEST_RECONNECT)
        try:
            connection = await self._client.connect()
            if connection is None:
                self._connect_at = math.inf
                return
            with self._mutex:
                self._connection = connection
            if self._changes.closing.is_set():  # too early for `close` to see this connection
                await self._disconnect()
                return
            direct = await is_direct(connection)
            await connection.execute(f"LISTEN {quote(self._changes.channel)}")
            if not direct:
                await self._probe()
        except Exception as error:
            logger.debug("no connection for announcements: %s", type(error).__name__)
            await self._disconnect()
        else:
            self._reconnect_pause = FIRST_RECONNECT
            self._changes.wake()  # announcements may have been missed while nobody listened

    async def _probe(self) -> None:
        # Do announcements come through? One from elsewhere tells; sent from here it could come back by accident.
        other = await self._client.connect()
        if other is not None:
            async with other:
                payloads = json_array(announcements([""], self._changes.name))
                await other.execute(ANNOUNCE, [self._changes.channel, payloads])
            self._unheard_since = monotonic()

    async def _listen(self, timeout: float) -> None:
        if self._connection is None:
            await self._changes.closing.wait(min(timeout, max(0.0, self._connect_at - monotonic())))
            return
        async for notify in self._connection.notifies(timeout=timeout):
            self._unheard_since = math.inf
            self._changes.wake(announced(notify.payload, self._changes.name))
        if monotonic() - self._unheard_since > PROBE_TIMEOUT:
            self._unheard_since = math.inf
            await self._connection.execute("UNLISTEN *")
            self._changes.warn_of_deafness()

    async def _poll(self) -> bool:
        """Ask where the streams of all waiting readers stand, wake those that are behind, say if there were any."""
        stream_ids = {place.stream_id for place in self._changes.waiting()}
        if not stream_ids:
            return False
        statement, params = self._changes.poll_statement, [json_array(stream_ids)]
        if self._connection is not None and self._client.joins_transactions:
            # Not into the caller's transaction, which belongs to another thread.
            cursor = await self._connection.execute(statement, params)
            rows: Sequence[Row] = await cursor.fetchall()
        else:
            # Through the client, so that the poll sees what the readers see: the caller's search_path, role and rights.
            rows = await self._client.query(statement, params)
        found = {stream_id: (state, total_chunks) for stream_id, state, total_chunks in rows}
        places = [place for place in self._changes.waiting() if place.stream_id in stream_ids]
        news = [place.wake_if_behind(*found.get(place.stream_id, (None, 0))) for place in places]
        return any(news)

    async def _disconnect(self) -> None:
        with self._mutex:
            connection, self._connection = self._connection, None
        self._unheard_since = math.inf
        if connection is not None:
            await connection.close()


class AsyncAnnouncer:
    """Tells other processes which streams have changed, after the fact and in the background.

    What piles up while one announcement is under way goes out together with the next. A client whose statements belong
    to a transaction of the caller announces at once instead: PostgreSQL delivers that when the transaction commits.
    """

    def __init__(self, changes: AsyncChanges) -> None:
        self._changes = changes
        self._client = changes.client
        self._mutex = Mutex()
        self._pending: dict[str, None] = {}
        self._filled = AsyncEvent()
        self._worker: AsyncWorker | None = None
        self._closing = False

    async def announce(self, stream_ids: Iterable[str]) -> None:
        """Announce that these streams have changed.

        Raises nothing, since what is not announced is found by polling; but in a transaction of the caller an error has
        undone what was to be announced, and is raised.
        """
        if self._client.joins_transactions:
            await self._send(stream_ids, None)
            return
        with self._mutex:
            self._pending.update(dict.fromkeys(stream_ids))
            self._filled.set()
            if self._worker is None:
                self._worker = async_spawn(self._work, "aibind_postgres-announcer")

    async def close(self) -> None:
        """Send what is left and end the worker."""
        with self._mutex:
            self._closing = True
            self._filled.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _work(self) -> None:
        try:
            while True:
                await self._filled.wait(0 if self._closing else LINGER)
                with self._mutex:
                    self._filled.clear()
                    batch, self._pending = self._pending, {}
                    if not batch:
                        self._worker = None
                        return
                try:
                    await self._send(batch, self._changes.name)
                except Exception as error:
                    logger.debug("an announcement was not sent: %s", type(error).__name__)
        except BaseException:  # cancelled, as when its event loop ends
            self._worker = None
            raise

    async def _send(self, stream_ids: Iterable[str], sender: str | None) -> None:
        payloads = json_array(announcements(stream_ids, sender))
        await self._client.query(ANNOUNCE, [self._changes.channel, payloads])


def _hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
    # Closing a connection while another thread waits on it is not safe; ending its traffic is, and wakes that thread.
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
