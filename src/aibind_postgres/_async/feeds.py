"""The live ends of streams: what is new is fetched once and taken by all who follow here."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from .._arguments import MAX_NUMBER
from .._concurrency import AsyncEvent
from .._sql import StreamStatements, json_text
from ..errors import StoreClosedError, StreamNotFoundError, copy_error, nothing_was_written
from ..models import StreamChunk, chunks_of
from .combining import AsyncCombiner

if TYPE_CHECKING:
    from typing_extensions import Self

    from .changes import AsyncChanges
    from .connections import Row
    from .database import AsyncDatabase

LIVE_PAGE = 200  # chunks of one stream that one fetch brings at most
FETCHES, FETCH_SIZE = 200, 8_000_000  # streams and, by what is known of them, characters that one statement reads
USUAL_SIZE = 100  # characters of a chunk where none is known yet
TAIL_CHUNKS, TAIL_SIZE = 500, 200_000  # chunks and characters that are kept for slower readers


class AsyncFeed:
    """One stream as it is known here: its last chunks, and who follows it.

    All of it is guarded by the mutex of the changes that it belongs to.
    """

    def __init__(self, stream_id: str) -> None:
        self.stream_id = stream_id
        self.places: set[AsyncPlace] = set()
        self.waiting: set[AsyncPlace] = set()
        self.fetching: AsyncPlace | None = None
        self.version = 1  # goes up with whatever may have happened to the stream
        self._fetched = 0  # the version at which the newest fetch began that brought all there was
        self._known = False  # it has been fetched at all
        self._tail: list[StreamChunk] = []
        self._start = self.end = 0  # the chunks of the tail have the numbers above the one, up to the other
        self._size = 0
        self._state: str | None = "active"  # None: there is no such stream
        self.total = 0  # chunks that it is known to have
        self._polled: object = None
        self.announced = False  # since the last poll that found something

    @property
    def over(self) -> bool:
        """Nothing comes after the tail."""
        return self._state != "active"

    @property
    def gone(self) -> bool:
        """There is no such stream any more; there may be another one of the same id."""
        return self._state is None

    @property
    def current(self) -> bool:
        """Nothing is known to have happened since the newest fetch."""
        return self._fetched == self.version

    def after(self, cursor: float) -> Sequence[StreamChunk] | None:
        """Return the chunks after `cursor`, none if there are none yet, None if they are not in the tail."""
        if cursor >= self.end:
            return ()
        if cursor < self._start:
            return None
        return self._tail[bisect_right(self._tail, cursor, key=itemgetter(0)) :]

    def wants(self, cursor: float) -> int:
        """Return the number after which to fetch: that of the tail if a reader waits there, else the caller's own."""
        if self._known and any(place.cursor < math.inf for place in self.waiting):
            return self.end
        return int(min(cursor, MAX_NUMBER))

    @property
    def page_size(self) -> int:
        """How many characters a fetch may bring, if chunks go on as they were."""
        return LIVE_PAGE * (self._size // len(self._tail) if self._tail else USUAL_SIZE)

    def take(self, version: int, after: int, least: int, rows: Sequence[Row]) -> None:
        """Take what was fetched after the number `after`, from the moment of `version` on, with `least` chunks then."""
        # A stream never gets shorter: if this one has, it is another one. And what is gone does not come back.
        if self.gone or not rows or -rows[0][0] < least:
            self._state = None
            return
        total, state = -rows[0][0], rows[0][1]
        chunks = list(chunks_of(rows[1:]))
        if not chunks and after + LIVE_PAGE < total:
            after = total  # a hole, and perhaps a huge one: those who follow read for themselves what is behind it
        if not self._known or after > self.end:
            self._begin(min(after, total))
        if after <= self.end:  # what was appended here meanwhile is in the tail already
            self._extend(chunks[bisect_right(chunks, self.end, key=itemgetter(0)) :])
            self.end = max(self.end, min(after + LIVE_PAGE, total))
        self.total = max(self.total, total)
        if after + LIVE_PAGE >= total:
            self._fetched = max(self._fetched, version)
            self._state = state

    def append(self, before: int, texts: Sequence[str]) -> bool:
        """Take what was appended here after the number `before`; return False if that has to be fetched."""
        follows = self._known and before == self.end
        self.total = max(self.total, before + len(texts))
        if not follows or len(texts) > LIVE_PAGE:
            return False
        self._extend([StreamChunk(seq, text) for seq, text in enumerate(texts, before + 1)])
        return True

    def _begin(self, after: int) -> None:
        self._tail, self._size = [], 0
        self._start = self.end = after
        self._known = True

    def _extend(self, chunks: Sequence[StreamChunk]) -> None:
        if chunks:
            self._tail += chunks
            self.end = chunks[-1].seq
            self._size += sum([len(chunk.data) for chunk in chunks])
            if len(self._tail) > TAIL_CHUNKS or self._size > TAIL_SIZE:
                self._trim(len(chunks))

    def _trim(self, newest: int) -> None:
        surplus = 0
        while len(self._tail) - surplus > newest and (
            len(self._tail) - surplus > TAIL_CHUNKS or self._size > TAIL_SIZE
        ):
            self._size -= len(self._tail[surplus].data)
            surplus += 1
        if surplus:
            self._start = self._tail[surplus - 1].seq
            del self._tail[:surplus]

    def stands(self, version: int, cursor: int, total_chunks: int) -> None:
        """Take the word of a reader who has read up to `cursor`, all there was at the moment of `version`."""
        if not self._known:
            self._begin(min(cursor, total_chunks))
        if cursor == self.end:
            self._fetched = max(self._fetched, version)
            self.total = max(self.total, total_chunks)

    def end_here(self) -> list[AsyncPlace]:
        """Note that this stream is no more, and return those who wait for it."""
        self._state = None
        return self.served()

    def polled(self, state: str | None, total_chunks: int) -> bool:
        """Say whether a poll has found what is not known yet; no state: no such stream.

        The same finding is no news again: those who follow may see other rows than the poll does. Where changes are
        announced, what is found is left to the announcement that is on its way, until the next poll.
        """
        finding = (state, total_chunks)
        if finding == self._polled or (state == "active" and total_chunks <= self.total):
            return False
        if self.announced:
            self.announced = False
            return False
        self._polled = finding
        return True

    @property
    def awaited(self) -> bool:
        """Somebody waits for what happens."""
        return bool(self.waiting) or any(place.alarm for place in self.places)

    def happened(self, appended: bool = False) -> None:
        """Have somebody look, since something may have happened; `appended`: it was no end of the stream."""
        self.version += 1
        self.summon()
        if not appended:
            for place in self.places:
                if place.alarm is not None:
                    place.alarm()

    def close(self) -> None:
        """Send everybody away."""
        for place in self.places:
            place.fail(StoreClosedError("this store was closed meanwhile"))
            if place.alarm is not None:
                place.alarm()

    def served(self) -> list[AsyncPlace]:
        """Return those who wait and need not wait any more, and count them no longer."""
        served = [place for place in self.waiting if self.over or place.cursor < self.end]
        self.waiting.difference_update(served)
        return served

    def summon(self) -> None:
        """Wake one of those who wait if there is something to fetch and nobody does."""
        if self.waiting and self.fetching is None and not self.current:
            self.waiting.pop().wake()


class QuietError(Exception):
    """A reader has lost patience. No `TimeoutError`: that may come from a driver, and means something else."""


class Look(NamedTuple):
    """What a feed knew when a look at the stream began."""

    version: int
    total: int
    over: bool


class AsyncPlace:
    """The place of one who follows a stream. Take it with `with`, and look only then.

    With `alarm`, that is called, under the mutex, for whatever may have ended the stream.
    """

    def __init__(self, changes: AsyncChanges, stream_id: str, alarm: Callable[[], None] | None = None) -> None:
        self.alarm = alarm
        self.feed = AsyncFeed(stream_id)  # until it is moved to the one that others follow
        self._changes = changes
        self._woken = AsyncEvent()
        self.cursor: float = 0  # while it waits, the number of the last chunk it has
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._changes.leave(self)

    def before_look(self) -> Look:
        """Return what to give to `stands` after a look of one's own that begins now."""
        with self._changes.mutex:
            return Look(self.feed.version, self.feed.total, self.feed.over)

    def stands(self, look: Look, cursor: int, total_chunks: int) -> None:
        """Tell the feed of an active stream that has so many chunks, and has been read up to `cursor`."""
        with self._changes.mutex:
            if look.over or total_chunks < look.total:
                # The look was at a new stream of this id, the feed is that of an earlier one, and others still hold it.
                for place in self._changes.drop(self.feed):
                    place.wake()
                self._changes.move(self)
                look = Look(0, 0, False)  # what has happened since the look, nobody has told this feed
            self.feed.stands(look.version, cursor, total_chunks)

    def wake(self) -> None:
        self._woken.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self.wake()

    async def follow(
        self, cursor: float, deadline: float = math.inf, *, patience: float = math.inf
    ) -> Sequence[StreamChunk] | None:
        """Wait for chunks after `cursor` and return them; none if the stream has ended, and there are none.

        Returns None if the feed does not have them: the caller reads for himself. A cursor of infinity waits for the
        end. Raises `StreamNotFoundError` if the stream is deleted, `TimeoutError` at the `deadline` of the monotonic
        clock, `QuietError` when nothing has come for `patience` seconds, and what fetching raises.
        """
        quiet_at = monotonic() + patience
        while True:
            feed = self.feed
            self._changes.database.check_owner()
            with self._changes.mutex:
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise copy_error(failure) from failure
                if feed.gone:
                    raise StreamNotFoundError(feed.stream_id)
                chunks = feed.after(cursor)
                if chunks is None or chunks or feed.over:
                    return chunks
                if to_fetch := not feed.current and feed.fetching is None:
                    feed.fetching = self
                else:
                    self._woken.clear()
                    self.cursor = cursor
                    feed.waiting.add(self)
            if to_fetch:
                await self._fetch(cursor, deadline)
            else:
                await self._wait(deadline, quiet_at)

    async def _wait(self, deadline: float, quiet_at: float) -> None:
        try:
            self._changes.keep_watch()
            until = min(deadline, quiet_at)
            if not await self._woken.wait(None if until == math.inf else max(0.0, until - monotonic())):
                if quiet_at < deadline:
                    raise QuietError
                raise TimeoutError(f"stream {self.feed.stream_id!r} is still active")
        except GeneratorExit:  # by the garbage collector perhaps, which may have come while the mutex is held
            raise
        except BaseException:
            with self._changes.mutex:
                self.feed.waiting.discard(self)
                self.feed.summon()  # another, if this one had been called to fetch
            raise

    async def _fetch(self, cursor: float, deadline: float) -> None:
        feed = self.feed
        woken: list[AsyncPlace] = []
        failure: Exception | None = None
        try:
            with self._changes.mutex:
                look, after, size = Look(feed.version, feed.total, False), feed.wants(cursor), feed.page_size
            rows = await self._changes.fetch(Fetch(feed.stream_id, after), size, deadline)
        except GeneratorExit:
            raise
        except BaseException as error:
            with self._changes.mutex:
                feed.fetching = None
                if isinstance(error, Exception) and monotonic() < deadline:
                    failure = error
                    woken, feed.waiting = list(feed.waiting), set()
                else:
                    feed.summon()
            raise
        else:
            with self._changes.mutex:
                feed.fetching = None
                feed.take(look.version, after, look.total, rows)
                woken = self._changes.drop(feed) if feed.gone else feed.served()
                feed.summon()
        finally:
            for place in woken:
                if failure is None:
                    place.wake()
                else:
                    place.fail(failure)


class Fetch(NamedTuple):
    stream_id: str
    after: int


class AsyncFetcher:
    """Reads what is new in streams; reads at the same time share statements.

    If a shared statement is refused, for a text in one of the streams perhaps, each reads for himself.
    """

    def __init__(self, database: AsyncDatabase, statements: StreamStatements) -> None:
        self._database = database
        self._sql = statements
        self._combiner = AsyncCombiner(self._run, max_items=FETCHES, max_size=FETCH_SIZE)

    async def fetch(self, fetch: Fetch, size: int, deadline: float) -> Sequence[Row]:
        """Return the number of chunks, below zero, with the state; then the chunks after `after`, a page at most."""
        return await self._database.retry(partial(self._fetch, fetch, size), deadline)

    async def _fetch(self, fetch: Fetch, size: int) -> Sequence[Row]:
        rows = None
        if not self._database.client.joins_transactions:  # a caller's own transaction is nobody else's
            rows = await self._combiner.call(fetch, size)
        return await self._fetch_alone(fetch) if rows is None else rows

    async def _fetch_alone(self, fetch: Fetch) -> Sequence[Row]:
        return await self._database.query(self._sql.read, [*fetch, LIVE_PAGE])

    async def _run(self, fetches: Sequence[Fetch]) -> Sequence[Sequence[Row] | None]:
        if len(fetches) == 1:
            return [await self._fetch_alone(fetches[0])]
        items = json_text(
            [{"place": place, "id": fetch.stream_id, "after": fetch.after} for place, fetch in enumerate(fetches)]
        )
        try:
            rows = await self._database.query(self._sql.read_batch, [items, LIVE_PAGE])
        except Exception as error:
            if not nothing_was_written(error):
                raise
            return [None] * len(fetches)
        results: list[list[Row]] = [[] for _ in fetches]
        for place, *row in rows:
            results[place].append(tuple(row))
        return results
