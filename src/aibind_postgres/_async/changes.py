"""Who follows which stream, and what wakes them: announcements, and a poll as the safety net."""

from __future__ import annotations

import logging
import math
import os
import socket
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg

from .._concurrency import Mutex, async_spawn
from .._sql import ANNOUNCE, StreamStatements, announced, announcements, json_array
from .._tables import quote
from .announcing import AsyncAnnouncer
from .connections import UnansweredError, execute, is_direct
from .database import CLOSING_TIMEOUT, WORKER_IDLE_TIMEOUT
from .feeds import AsyncFeed, AsyncFetcher, AsyncPlace

if TYPE_CHECKING:
    from .connections import Row
    from .database import AsyncDatabase

logger = logging.getLogger("aibind_postgres")

ANSWER_TIMEOUT = 5.0  # seconds that the connection for announcements may take to answer
LONGEST_SILENCE = 3.0  # seconds of it after which news that only a poll has found makes that connection doubtful
PROBE_TIMEOUT = 2.0  # seconds in which an announcement to oneself must have arrived
LONGEST_PAUSE = 10  # times poll_interval: what polling backs off to while it finds nothing
LONGEST_RETRY = 5.0  # seconds between two polls while they fail
FIRST_RECONNECT, LONGEST_RECONNECT = 0.1, 30.0  # seconds between two attempts to connect, doubled each time


class AsyncChanges:
    """The feeds of one store. While somebody follows them, a watch looks out for what happens to their streams."""

    def __init__(
        self, database: AsyncDatabase, statements: StreamStatements, channel: str, poll_interval: float
    ) -> None:
        self.database = database
        self.channel = channel
        self.poll_statement = statements.poll
        self.poll_interval = poll_interval
        self.fetch = AsyncFetcher(database, statements).fetch
        self.mutex = Mutex()
        self._announcer = AsyncAnnouncer(self)
        self._feeds: dict[str, set[AsyncFeed]] = {}
        self._left: deque[AsyncPlace] = deque()
        self._watch: AsyncWatch | None = None
        self._known_deaf = False
        self._name = uuid.uuid4().hex

    @property
    def name(self) -> str:
        """What tells this store's own announcements from others. A process that was forked has another name."""
        return f"{self._name}/{os.getpid()}"

    def place(self, stream_id: str, alarm: Callable[[], None] | None = None) -> AsyncPlace:
        """Return a place at the feed of a stream; in transactions of the callers, each sees a stream of his own."""
        self.database.check_owner()
        place = AsyncPlace(self, stream_id, alarm)
        with self.mutex:
            self._clear_left()
            self.move(place)
        return place

    def move(self, place: AsyncPlace) -> None:
        """Put a place at the feed of its stream as it is now. To be called under the mutex."""
        stream_id = place.feed.stream_id
        place.feed.places.discard(place)
        if not place.feed.places:
            self._forget(place.feed)
        feeds = self._feeds.setdefault(stream_id, set())
        going_on = () if self.database.client.joins_transactions else [feed for feed in feeds if not feed.over]
        place.feed = next(iter(going_on), None) or AsyncFeed(stream_id)
        place.feed.places.add(place)
        feeds.add(place.feed)

    def leave(self, place: AsyncPlace) -> None:
        # Without the mutex: the garbage collector closes forgotten readers, in any thread and at any moment, also in
        # one that holds it.
        self._left.append(place)

    def _clear_left(self) -> None:
        while self._left:
            place = self._left.popleft()
            feed = place.feed
            feed.places.discard(place)
            feed.waiting.discard(place)
            if feed.fetching is place:  # interrupted before it could say so
                feed.fetching = None
            feed.summon()
            if not feed.places:
                self._forget(feed)

    def drop(self, feed: AsyncFeed) -> list[AsyncPlace]:
        """Part with the feed of a stream that is no more, and return those who wait at it. Under the mutex."""
        self._forget(feed)
        woken = feed.end_here()
        feed.happened()
        return woken

    def _forget(self, feed: AsyncFeed) -> None:
        feeds = self._feeds.get(feed.stream_id, set())
        feeds.discard(feed)
        if not feeds:
            self._feeds.pop(feed.stream_id, None)

    def wake(self, stream_ids: Iterable[str] | None = None) -> None:
        """Have those who follow these streams, or all, look at them."""
        with self.mutex:
            for stream_id in list(self._feeds) if stream_ids is None else stream_ids:
                for feed in self._feeds.get(stream_id, ()):
                    feed.announced = stream_ids is not None
                    # Where all look, the next poll tells those who would only see whether their stream has ended.
                    feed.happened(appended=stream_ids is None)

    async def tell(self, stream_ids: Collection[str]) -> None:
        """Wake those who follow these streams here, and have the change announced to other processes."""
        self.wake(stream_ids)
        await self._announcer.announce(stream_ids)

    async def tell_deleted(self, stream_id: str) -> None:
        """Send away those who follow a stream here: another one of its id may be there at once. And announce it."""
        woken: list[AsyncPlace] = []
        if not self.database.client.joins_transactions:  # else it may not come to that
            with self.mutex:
                for feed in list(self._feeds.get(stream_id, ())):
                    woken += self.drop(feed)
        for place in woken:
            place.wake()
        await self.tell([stream_id])

    async def tell_appended(self, appended: Collection[tuple[str, int, Sequence[str]]]) -> None:
        """Hand on what has been appended, as stream ids with the number before and the texts, and have it announced."""
        served: list[AsyncPlace] = []
        with self.mutex:
            for stream_id, before, texts in appended:
                for feed in self._feeds.get(stream_id, ()):
                    # In a transaction of the caller others may not see it yet.
                    if self.database.client.joins_transactions or not feed.append(before, texts):
                        feed.happened(appended=True)
                    else:
                        served += feed.served()
        for place in served:
            place.wake()
        await self._announcer.announce([stream_id for stream_id, _, _ in appended])

    def followed(self) -> list[AsyncFeed]:
        """Return the feeds of those who are waiting just now."""
        with self.mutex:
            self._clear_left()
            return [feed for feeds in self._feeds.values() for feed in feeds if feed.awaited]

    def poll_found(self, found: Mapping[str, tuple[str, int]], asked: Iterable[AsyncFeed]) -> bool:
        """Have those look to whom a poll brings news, and say if it has brought any."""
        with self.mutex:
            news = False
            for feed in asked:
                state, total_chunks = found.get(feed.stream_id, (None, 0))
                if feed.polled(state, total_chunks):
                    feed.happened(appended=state == "active")
                    news = True
            return news

    def keep_watch(self) -> None:
        """See to it that somebody is looking out."""
        if not self._is_watched():
            with self.mutex:
                if not self._is_watched() and not self.database.closing.is_set():
                    self._watch = AsyncWatch(self)

    def _is_watched(self) -> bool:
        watch = self._watch  # which another thread may let go at any moment
        return watch is not None and watch.is_alive()

    def end_watch(self, watch: AsyncWatch, *, if_idle: bool) -> bool:
        """Let a watch go: the next who waits starts another. With `if_idle`, only if nobody follows anything."""
        with self.mutex:
            self._clear_left()
            if if_idle and self._feeds:
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
        """Send everybody away, end the watch, and announce what is left."""
        with self.mutex:
            for feeds in self._feeds.values():
                for feed in feeds:
                    feed.close()
            watch = self._watch
        try:
            if watch is not None:
                await watch.close()
        finally:
            await self._announcer.close()


class AsyncWatch:
    """The worker that looks out for waiting readers: on a connection of its own for announcements, and by polling.

    It ends when there has been no reader for a while.
    """

    def __init__(self, changes: AsyncChanges) -> None:
        self._changes = changes
        self._client = changes.database.client
        self._mutex = Mutex()
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self._direct = False  # it leads to one server process, and not to a pooler
        self._unheard_since = math.inf  # when a probe was sent that has not been heard yet
        self._heard_at = 0.0  # when the connection last showed that it lives
        self._connect_at = 0.0
        self._reconnect_pause = FIRST_RECONNECT
        self._worker = async_spawn(self._run, "aibind_postgres-watch")

    def is_alive(self) -> bool:
        return self._worker.is_alive()

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
            while not changes.database.closing.is_set():
                if changes.followed():
                    busy_at = monotonic()
                elif monotonic() - busy_at > WORKER_IDLE_TIMEOUT and changes.end_watch(self, if_idle=True):
                    return
                if self._connection is None and monotonic() >= self._connect_at:
                    await self._connect()
                try:
                    await self._listen(min(pause, WORKER_IDLE_TIMEOUT))
                    if monotonic() - polled_at < pause:
                        continue
                    polled_at = monotonic()
                    if news := await self._poll():
                        await self._doubt()
                except Exception as error:
                    if changes.database.closing.is_set():
                        return
                    # Whatever it is: the readers look for themselves, and meet it where it can be raised.
                    logger.debug("looking out for changes failed: %s", type(error).__name__)
                    if self._connection is not None and (self._connection.closed or isinstance(error, UnansweredError)):
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
            if self._changes.database.closing.is_set():  # too early for `close` to see this connection
                await self._disconnect()
                return
            self._direct = await is_direct(connection, monotonic() + ANSWER_TIMEOUT)
            await self._ask(connection, f"LISTEN {quote(self._changes.channel)}")
            if not self._direct:
                await self._probe()
        except Exception as error:
            logger.debug("no connection for announcements: %s", type(error).__name__)
            await self._disconnect()
        else:
            self._reconnect_pause = FIRST_RECONNECT
            self._changes.wake()  # announcements may have been missed while nobody listened

    async def _ask(self, connection: psycopg.AsyncConnection[Row], sql: str, *params: object) -> Sequence[Row]:
        """Run a statement on the connection for announcements."""
        rows = await execute(connection, sql, params, monotonic() + ANSWER_TIMEOUT)
        self._heard_at = monotonic()
        return rows

    async def _probe(self) -> None:
        # Do announcements come through? One from elsewhere tells; sent from here it could come back by accident.
        other = await self._client.connect()
        if other is not None:
            try:
                await execute(other, ANNOUNCE, self._to_oneself(), monotonic() + ANSWER_TIMEOUT)
            finally:
                await other.close()
            self._unheard_since = monotonic()

    async def _doubt(self) -> None:
        """See if the connection for announcements still lives, after news that did not come by it.

        By an announcement, so that polling goes on meanwhile. Where the poll itself goes by that connection, it tells.
        """
        silent = monotonic() - self._heard_at > LONGEST_SILENCE and self._unheard_since == math.inf
        if self._connection is not None and self._direct and silent and not self._client.joins_transactions:
            await self._client.query(ANNOUNCE, self._to_oneself())
            self._unheard_since = monotonic()

    def _to_oneself(self) -> Sequence[str]:
        return [self._changes.channel, json_array(announcements([""], self._changes.name))]

    async def _listen(self, timeout: float) -> None:
        if self._connection is None:
            await self._changes.database.closing.wait(min(timeout, max(0.0, self._connect_at - monotonic())))
            return
        async for notify in self._connection.notifies(timeout=timeout):
            self._unheard_since, self._heard_at = math.inf, monotonic()
            self._changes.wake(announced(notify.payload, self._changes.name))
        if monotonic() - self._unheard_since > PROBE_TIMEOUT:
            self._unheard_since = math.inf
            if self._direct:
                await self._disconnect()
            else:
                await self._ask(self._connection, "UNLISTEN *")
                self._changes.warn_of_deafness()

    async def _poll(self) -> bool:
        """Ask where the streams stand that somebody waits for, and say if that brought news."""
        feeds = self._changes.followed()
        if not feeds:
            return False
        stream_ids = {feed.stream_id for feed in feeds}
        statement, params = self._changes.poll_statement, [json_array(stream_ids)]
        if self._connection is not None and self._client.joins_transactions:
            # Not into the caller's transaction, which belongs to another thread.
            rows = await self._ask(self._connection, statement, *params)
        else:
            # Through the client, so that the poll sees what the readers see: the caller's search_path, role and rights.
            rows = await self._client.query(statement, params)
        return self._changes.poll_found({stream_id: (state, total) for stream_id, state, total in rows}, feeds)

    async def _disconnect(self) -> None:
        with self._mutex:
            connection, self._connection = self._connection, None
        self._unheard_since = math.inf
        if connection is not None:
            await connection.close()


def _hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
    # Closing a connection while another thread waits on it is not safe; ending its traffic is, and wakes that thread.
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
