"""What a store runs its statements through: a client, with the errors of this package, and further attempts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, async_running_loop
from ..errors import ForkedError, StoreClosedError, translated
from .client import as_client

if TYPE_CHECKING:
    from .client import AsyncClientLike
    from .connections import Row

Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)

# Of the workers in the background, in seconds.
WORKER_IDLE_TIMEOUT = 30.0  # that one with nothing to do stays, before it ends
CLOSING_TIMEOUT = 10.0  # that closing waits for one

FIRST_RETRY, LONGEST_RETRY = 0.05, 2.0  # seconds between two attempts to reach the server, doubled each time


class AsyncAttempt(Protocol[ResultOut]):
    """What may be tried again."""

    async def __call__(self) -> ResultOut: ...


class AsyncDatabase:
    """The database of one store. Once `closing` is set, nothing runs any more and nobody sleeps on."""

    def __init__(self, client: AsyncClientLike, retry_for: float, timeout: float | timedelta | None) -> None:
        self.client = as_client(client, None if timeout is None else arguments.seconds(timeout, "timeout"))
        self.closing = AsyncEvent()
        self._retry_for = retry_for
        # The process whose connections and workers these are; none before there are any.
        self._process = os.getpid() if self.client.is_connected() else None
        self._loop: object = None

    @property
    def inherited(self) -> bool:
        """Whether this belongs to another process, from which this one was forked."""
        return self._process is not None and self._process != os.getpid()

    def check_owner(self) -> None:
        """Raise `ForkedError` in another process, `RuntimeError` in another event loop, than has used this first.

        To be called before a mutex is taken: one that is held by a thread of the parent is never released here.
        """
        if self._process is None:
            self._process = os.getpid()
        elif self.inherited:
            raise ForkedError(
                "this store belongs to the process that this one was forked from, and so do its connections: "
                "make a store in each process, after the fork"
            )
        if self._loop is None:
            self._loop = async_running_loop()
        elif self._loop is not async_running_loop():
            raise RuntimeError("this store is bound to a different event loop: make one in each")

    async def query(self, statement: str, params: Sequence[object]) -> Sequence[Row]:
        """Run one statement and return its rows."""
        self.check_owner()
        if self.closing.is_set():
            raise StoreClosedError("this store is closed")
        try:
            return await self.client.query(statement, params)
        except Exception as error:
            if self.closing.is_set():
                raise StoreClosedError("this store was closed meanwhile") from error
            if (known := translated(error)) is not None:
                # What cannot be encoded is quoted in full by Python's error.
                raise known from (None if isinstance(error, UnicodeError) else error)
            raise

    async def retry(self, attempt: AsyncAttempt[Result], deadline: float = math.inf) -> Result:
        """Make an attempt, and if the server cannot be reached others for `retry_for` seconds, more and more slowly."""
        give_up_at: float | None = None
        pause = FIRST_RETRY
        while True:
            try:
                return await attempt()
            except Exception as error:
                if not self.client.is_recoverable(error):
                    raise
                now = monotonic()
                if give_up_at is None:
                    give_up_at = now + self._retry_for
                if now >= deadline:
                    raise TimeoutError("the server could not be reached in time") from error
                if now >= give_up_at:
                    raise
                # Spread out: many callers lose the server at the same moment.
                await self.sleep(min(uniform(pause / 2, pause), give_up_at - now, deadline - now))
                pause = min(pause * 2, LONGEST_RETRY)

    async def query_with_retry(
        self, statement: str, params: Sequence[object], deadline: float = math.inf
    ) -> Sequence[Row]:
        """Read by one statement, persistently."""
        return await self.retry(partial(self.query, statement, params), deadline)

    async def sleep(self, seconds: float) -> None:
        if await self.closing.wait(seconds):
            raise StoreClosedError("this store was closed meanwhile")
