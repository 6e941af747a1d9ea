"""The bodies of answers in plain text: each text of a source is sent as it is produced."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_spawn
from ..models import StreamEvent, chunk_text
from ..wire import INTERRUPTED
from .source import AsyncSource


class AsyncPlainTextBody:
    """One body, and the worker that reads its source. The worker reads one text for each one that the server requests.

    The request waits for the first text, since an error before it has a status, and the server iterates over the
    others, in another task or after the end of the request. The source needs one task or thread from beginning to end:
    it may hold cancel scopes, and resources that are bound to a thread.

    Args:
        source: The source. Its events are not sent.
        context: Entered by the worker around the source.
        disconnect: Called if the server has requested no text for `send_timeout` seconds, after the source was closed.
        send_timeout: Seconds.
    """

    def __init__(
        self,
        source: AsyncIterable[str | StreamEvent],
        context: Callable[[], AbstractAsyncContextManager[object]],
        disconnect: Callable[[], object] | None,
        send_timeout: float,
    ) -> None:
        self._source = AsyncSource(source)
        self._context = context
        self._disconnect = disconnect
        self._send_timeout = send_timeout
        self._worker: AsyncWorker | None = None
        self._mutex = Mutex()
        self._requested = AsyncEvent()  # the server needs another text, or no more
        self._arrived = AsyncEvent()  # the requested text has arrived, or the worker has ended
        self._text: bytes | None = None  # the newest one; None when the worker has ended
        self._error: Exception | None = None
        self._is_closed = False  # the server needs no more
        self._is_ended = False  # the worker has ended

    async def open(self) -> AsyncIterator[bytes] | None:
        """Wait for the first text.

        Returns:
            An iterator over the encoded texts, or None if the source has ended without a text. If the iterator raises,
            the answer is incomplete: the server must close the connection, so that the client notices.

        Raises:
            Exception: The error of the source.
        """
        try:
            self._worker = async_spawn(self._run, "aibind_postgres-plain-text", inherit=True)
            first = await self._receive()
        except BaseException:
            await self._close()
            raise
        return None if first is None else self._iterate(first)

    async def _iterate(self, text: bytes | None) -> AsyncIterator[bytes]:
        try:
            while text is not None:
                yield text
                with self._mutex:
                    if not self._is_ended:
                        self._arrived.clear()
                        self._requested.set()
                text = await self._receive()
        finally:
            await self._close()

    async def _receive(self) -> bytes | None:
        await self._arrived.wait()
        if self._error is not None:
            raise self._error
        return self._text

    async def _close(self) -> None:
        """Let the worker end, which closes the source."""
        with self._mutex:
            self._is_closed = True
            self._requested.set()
        if self._worker is None:
            await self._source.close()
        else:
            await self._source.interrupt(self._worker)

    async def _run(self) -> None:
        is_stalled = False
        error: Exception | None = RuntimeError(INTERRUPTED)  # if the worker is cancelled
        try:
            async with self._context():
                try:
                    is_stalled = not await self._send_texts()
                finally:
                    await self._source.close()
            if is_stalled and self._disconnect is not None:
                # A server that requests another text meanwhile waits for the end. Else it could use the connection for
                # another request, which would be disconnected.
                self._disconnect()
            error = TimeoutError("the client does not read") if is_stalled else None
        except Exception as raised:
            error = raised
        finally:
            with self._mutex:
                self._is_ended = True
                self._text, self._error = None, error
                self._arrived.set()

    async def _send_texts(self) -> bool:
        """Pass the texts to the server. Return False if it requests no more because the client does not read."""
        async for item in self._source.items:
            if not isinstance(item, str):
                chunk_text(item)  # raises if it is not an event
            elif item:
                text = item.encode()
                with self._mutex:
                    if self._is_closed:
                        return True
                    self._requested.clear()
                    self._text = text
                    self._arrived.set()
                is_requested = await self._requested.wait(self._send_timeout)
                if self._is_closed or not is_requested:
                    return self._is_closed
        return True
