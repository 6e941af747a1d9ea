"""The limit of answers that are produced for one user at the same time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from .._concurrency import Mutex
from ..errors import WebError

if TYPE_CHECKING:
    from .stream_store import AsyncPostgresStreamStore


class AsyncRunningAnswers:
    """The running answers of each user. This object counts those that are starting, the store the others."""

    def __init__(self, store: AsyncPostgresStreamStore, maximum: int | None) -> None:
        self._store = store
        self._maximum = maximum
        self._mutex = Mutex()
        self._starting: dict[str, tuple[str, ...]] = {}  # stream ids by user, from the check to the start

    @asynccontextmanager
    async def reserved(self, user: str | None, stream_id: str) -> AsyncIterator[None]:
        """Return a context manager in which to start an answer. Raise `WebError` (429) if the user has the maximum."""
        if self._maximum is None or user is None:
            yield
            return
        with self._mutex:
            earlier = self._starting.get(user, ())
            self._starting[user] = (*earlier, stream_id)
        try:
            if len({*earlier, *await self._store._running(user, self._maximum)}) >= self._maximum:
                raise WebError(429, f"at most {self._maximum} answers are produced at the same time: wait for one")
            yield
        finally:
            with self._mutex:
                self._starting[user] = tuple(each for each in self._starting[user] if each != stream_id)
                if not self._starting[user]:
                    del self._starting[user]
