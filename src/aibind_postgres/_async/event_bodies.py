"""The bodies of event streams: a limit of readers, and an end for clients that do not read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from time import monotonic
from weakref import finalize

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from ..errors import StreamNotFoundError, WebError
from .source import close_source

logger = logging.getLogger("aibind_postgres.web")

CHECKS_PER_TIMEOUT = 4  # of the watchdog


class EventBody:
    """The state of one body.

    The server requests an event from the body, sends it, and requests the next one. Only the holder of `lock` uses
    `events`. The body holds the lock while it waits for an event. If the server has requested no event for
    `send_timeout` seconds, the watchdog acquires the lock and keeps it.
    """

    def __init__(
        self,
        stream_id: str,
        reader: tuple[str, str],
        events: AsyncIterator[bytes],
        disconnect: Callable[[], object] | None,
    ) -> None:
        self.stream_id = stream_id
        self.reader = reader
        self.events: AsyncIterator[bytes] | None = events
        self.disconnect = disconnect
        self.lock = Mutex()  # acquired without waiting
        self.disconnected = AsyncEvent()  # set once the watchdog has disconnected the client
        self.newest = b""  # the last event that was passed to the server
        self._checked = self.newest, monotonic()  # `newest` at the last check, and when it was first seen

    def lock_if_stalled(self, send_timeout: float) -> bool:
        """If the server has been sending one event for `send_timeout` seconds, acquire the lock. Return True if so."""
        checked, since = self._checked
        if self.newest is not checked:
            self._checked = self.newest, monotonic()
            return False
        return monotonic() - since >= send_timeout and self.lock.acquire(False)


class AsyncEventBodies:
    """The bodies that one handler sends."""

    def __init__(self, max_readers: int, send_timeout: float) -> None:
        self._max_readers = max_readers
        self._send_timeout = send_timeout
        self._mutex = Mutex()
        self._open: dict[tuple[str, str], set[EventBody]] = {}  # by the subject of the limit
        self._ended: deque[EventBody] = deque()
        self._watchdog: AsyncWorker | None = None

    def open(
        self,
        stream_id: str,
        user: str | None,
        events: AsyncIterator[bytes],
        disconnect: Callable[[], object] | None,
        *,
        checked: bool = False,
    ) -> AsyncIterator[bytes]:
        """Return a body that yields the events of a stream.

        Args:
            stream_id: The id of the stream.
            user: The user of the request, or None.
            events: The encoded events.
            disconnect: Called after `events` was closed because the client does not read. Default: None.
            checked: Whether `check` was called before. Then the maximum is not checked again, and simultaneous requests
                may exceed it. Default: False.

        Raises:
            WebError: 429: the user, or the stream if there is no user, has the maximum number of readers.
        """
        reader = _reader(stream_id, user)
        body = EventBody(stream_id, reader, events, disconnect)
        with self._mutex:
            self._remove_ended()
            if not checked:
                self._refuse_at_maximum(reader)
            if self._watchdog is None or not self._watchdog.is_alive():
                self._watchdog = async_spawn(self._watch, "aibind_postgres-send-timeout")
            self._open.setdefault(reader, set()).add(body)
        iterator = self._iterate(body, events)
        # A generator that is collected before its first step does not run its `finally` block.
        finalize(iterator, self._ended.append, body).atexit = False
        return iterator

    def check(self, stream_id: str, user: str | None) -> None:
        """Raise `WebError` (429) if `open` would."""
        with self._mutex:
            self._remove_ended()
            self._refuse_at_maximum(_reader(stream_id, user))

    def _refuse_at_maximum(self, reader: tuple[str, str]) -> None:
        if len(self._open.get(reader, ())) >= self._max_readers:
            raise WebError(429, f"the {reader[0]} has the maximum of {self._max_readers} readers: try again later")

    async def _iterate(self, body: EventBody, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        acquire, release = body.lock.acquire, body.lock.release
        try:
            if acquire(False):
                async for body.newest in events:
                    release()
                    yield body.newest
                    if not acquire(False):
                        break
                else:
                    return
            await body.disconnected.wait()  # otherwise, the watchdog could disconnect the connection's next request
        except StreamNotFoundError:  # the status line has been sent; a client that resumes gets 404
            logger.info("stream %r was deleted while a client read it", body.stream_id)
        finally:
            acquire(False)  # the watchdog must not disconnect the connection's next request
            body.events = None  # this frame has the only other reference
            self._ended.append(body)

    async def _watch(self) -> None:
        """Close the events of clients that do not read, until there are no readers."""
        never = AsyncEvent()
        while True:
            await never.wait(self._send_timeout / CHECKS_PER_TIMEOUT)
            with self._mutex:
                self._remove_ended()
                if not self._open:
                    self._watchdog = None
                    return
                bodies = [body for readers in self._open.values() for body in readers]
            for body in bodies:
                if body.lock_if_stalled(self._send_timeout):
                    await self._close(body)

    async def _close(self, body: EventBody) -> None:
        logger.info("a client has not read stream %r for %g seconds", body.stream_id, self._send_timeout)
        try:
            await close_source(body.events)
            self._ended.append(body)
            if body.disconnect is not None:
                body.disconnect()
        except Exception:
            logger.exception("the client of stream %r could not be disconnected", body.stream_id)
        finally:
            body.disconnected.set()

    def _remove_ended(self) -> None:
        # A queue, since the garbage collector may end a body in a thread that holds the mutex.
        while self._ended:
            body = self._ended.popleft()
            bodies = self._open.get(body.reader, set())
            bodies.discard(body)
            if not bodies:
                self._open.pop(body.reader, None)


def _reader(stream_id: str, user: str | None) -> tuple[str, str]:
    """Return the subject of the limit of readers: the user, or the stream."""
    return ("stream", stream_id) if user is None else ("user", user)
