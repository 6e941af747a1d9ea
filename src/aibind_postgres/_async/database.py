"""The database of a store: run statements, translate errors and retry."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, async_running_loop
from .._leases import Contact
from .._sqlstate import FEATURE_NOT_SUPPORTED, is_transient, sqlstate, translate
from .._telemetry import NO_ATTRIBUTES, StoreMetrics
from ..errors import ForkedError, StoreClosedError
from ..metrics import RETRIES, Attributes, Metrics
from .psycopg_clients import as_client

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .client import AsyncClient
    from .psycopg_clients import AsyncClientLike

Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)

WORKER_IDLE_TIMEOUT = 30.0  # seconds without work after which a background worker ends
CLOSING_TIMEOUT = 10.0  # seconds that `close` waits for a background worker

MIN_RETRY_PAUSE, MAX_RETRY_PAUSE = 0.05, 2.0  # seconds between two attempts; the pause doubles each time


class RetryableError(Exception):
    """Raised by an attempt that `retry` should repeat, whatever the client."""


class AsyncAttempt(Protocol[ResultOut]):
    """An operation that can be repeated."""

    async def __call__(self) -> ResultOut: ...


class AsyncDatabase:
    """The database of one store. When `closing` is set, statements and pauses raise `StoreClosedError`."""

    def __init__(
        self,
        client: AsyncClientLike,
        retry_for: float,
        timeout: float | timedelta | None,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = None if metrics is None else StoreMetrics(metrics)
        self.client = as_client(client, None if timeout is None else arguments.seconds(timeout, "timeout"))
        self.closing = AsyncEvent()
        self.contact = Contact()
        self.closed_with: set[AsyncEvent] = set()  # events that are set when the store is closed
        self.last_housekeeping: float | None = None  # the last turn of housekeeping; None without a housekeeper
        self.has_citus = False  # as of the last look-up of the columns
        self.is_distributed = False  # whether statements on several streams run on several servers, as with Citus
        self._retry_for = retry_for
        self._statements = self._failures = 0
        # The id of the process that owns the connections and workers; None before there are any.
        self._process = os.getpid() if self.client.is_connected() else None
        self._loop: object = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.client!r}, {self.state}>"

    def add_client(self, client: AsyncClient) -> None:
        """Let `check_owner` also apply to the open connections of another client of the store."""
        if client.is_connected():
            self._process = os.getpid()

    @property
    def state(self) -> str:
        """Return "open" or "closed"."""
        return "closed" if self.closing.is_set() else "open"

    @property
    def inherited(self) -> bool:
        """Whether this process was forked from the owner."""
        return self._process is not None and self._process != os.getpid()

    def check_owner(self) -> None:
        """Raise if the process or event loop differs from the one of the first call.

        Call this before acquiring a mutex: if a thread of the parent process held it at the fork, it is never released.

        Raises:
            ForkedError: The process differs.
            RuntimeError: The event loop differs.
        """
        if self._process == os.getpid() and self._loop is async_running_loop():
            return
        if self._process is None:
            self._process = os.getpid()
        self.check_process()
        if self._loop is None:
            self._loop = async_running_loop()
        elif self._loop is not async_running_loop():
            raise RuntimeError("this store is bound to a different event loop: make a store in each event loop")

    def count(self, name: str, amount: int = 1, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Add to a counter of the store's metrics, if it has any."""
        if self.metrics is not None:
            self.metrics.add(name, amount, attributes)

    def check_process(self) -> None:
        """Raise `ForkedError` if this process was forked from the owner."""
        if self.inherited:
            raise ForkedError(
                "this store and its connections belong to the parent of this forked process: "
                "make a store in each process, after the fork"
            )

    def get_stats(self) -> dict[str, int]:
        """Return the statistics of the pool, if the store owns it, and of the statements."""
        counts = {"statements_num": self._statements, "statements_errors": self._failures}
        return {**self.client.get_stats(), **counts}

    def begin_closing(self) -> None:
        """Let statements and pauses raise `StoreClosedError` from now on."""
        self.closing.set()
        for event in tuple(self.closed_with):
            event.set()

    async def query(self, statement: str, params: Sequence[object], timeout: float | None = None) -> Sequence[Row]:
        """Run one statement and return its rows. Errors that `translate` knows become errors of this package.

        Args:
            statement: The statement, with numbered parameters.
            params: The values of the parameters.
            timeout: Seconds, as for the client's `query_within`. Default: the time limits of the client.

        Raises:
            StoreClosedError: The store is closed, or was closed during the call.
        """
        self.check_owner()
        if self.closing.is_set():
            raise StoreClosedError("this store is closed: make a new one")
        self._statements += 1
        started = monotonic()
        try:
            if timeout is None:
                rows = await self.client.query(statement, params)
            else:
                rows = await self.client.query_within(statement, params, timeout)
        except Exception as error:
            self._failures += 1
            if self.client.is_recoverable(error) and not is_transient(error):
                self.contact.failed()
            if self.closing.is_set():
                raise StoreClosedError("this store was closed during the call") from error
            if (translated := translate(error)) is not None:
                # A UnicodeError quotes the whole text, which may be confidential.
                raise translated from (None if isinstance(error, UnicodeError) else error)
            raise
        self.contact.succeeded(monotonic(), started)
        return rows

    async def query_either(self, statement: str, distributed: str, params: Sequence[object]) -> Sequence[Row]:
        """Run a statement, or its form for distributed tables if the server refuses the first one."""
        if not self.is_distributed:
            try:
                return await self.query(statement, params)
            except Exception as error:
                if not self.refuses(error):
                    raise
        return await self.query(distributed, params)

    def refuses(self, error: Exception) -> bool:
        """Return True if a server refuses a statement on several streams. With Citus, none is tried again.

        Without Citus, the error is that of a trigger or driver, and may not occur the next time.
        """
        refused = sqlstate(error) == FEATURE_NOT_SUPPORTED and not self.client.in_transaction()
        self.is_distributed = self.is_distributed or (refused and self.has_citus)
        return refused

    async def retry(self, attempt: AsyncAttempt[Result], deadline: float = math.inf) -> Result:
        """Run `attempt`. Repeat it with growing pauses for up to `retry_for` seconds while its errors are recoverable.

        Args:
            attempt: The operation.
            deadline: The value of `monotonic()` at which to stop retrying; no limit by default.

        Raises:
            TimeoutError: The deadline has passed.
            Exception: The last error, if it is not recoverable or `retry_for` seconds have passed.
        """
        give_up_at: float | None = None
        pause = MIN_RETRY_PAUSE
        while True:
            try:
                return await attempt()
            except Exception as error:
                if not isinstance(error, RetryableError) and not self.client.is_recoverable(error):
                    raise
                now = monotonic()
                if give_up_at is None:
                    give_up_at = now + self._retry_for
                if now >= deadline:
                    raise TimeoutError("no up-to-date server has answered within the timeout") from error
                if now >= give_up_at:
                    raise
                self.count(RETRIES)
                # The pause is random, since many callers lose the connection at the same time.
                await self.sleep(min(uniform(pause / 2, pause), give_up_at - now, deadline - now))
                pause = min(pause * 2, MAX_RETRY_PAUSE)

    async def sleep(self, seconds: float) -> None:
        """Sleep. Raise `StoreClosedError` as soon as the store is closed."""
        if await self.closing.wait(seconds):
            raise StoreClosedError("this store was closed during the call")
