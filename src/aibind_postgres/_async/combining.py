"""Many calls at the same time, one run: what queues while a run is under way goes out together in the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Generic, Protocol, TypeVar

from .._concurrency import AsyncOneShotEvent, Mutex, async_shielded
from ..errors import AibindError, copy_error

Item = TypeVar("Item")
Result = TypeVar("Result")

ItemIn = TypeVar("ItemIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

PATIENCE = 0.1  # seconds after which a run that has not returned no longer holds up the others


class AsyncRun(Protocol[ItemIn, ResultOut]):
    """Takes the items of a batch and returns their results, in the same order."""

    async def __call__(self, items: Sequence[ItemIn], /) -> Sequence[ResultOut]: ...


class AsyncCall(Generic[Item, Result]):
    """One caller's item, and what comes of it."""

    woken: AsyncOneShotEvent  # there once the call queues

    def __init__(self, item: Item, size: int) -> None:
        self.item = item
        self.size = size
        self.leads = False
        self._results: Sequence[Result] | Exception = ()

    @property
    def settled(self) -> bool:
        return self._results != ()

    def settle(self, result: Result) -> None:
        self._results = (result,)

    def fail(self, error: Exception) -> None:
        self._results = error

    def outcome(self) -> Result:
        """Return the result, or raise the error: to each caller its own, who may hang notes and context on it."""
        if isinstance(self._results, Exception):
            raise copy_error(self._results) from self._results
        if not self._results:
            raise AibindError("this call was combined with others and broken off: it is not known if it took effect")
        return self._results[0]


class AsyncCombiner(Generic[Item, Result]):
    """Combines calls into runs.

    The first caller runs its own item at once. Callers that come meanwhile queue, each with a wake-up of its own. When
    the run returns, the one who has waited longest becomes the leader and runs all that has queued, at most `max_items`
    of a total size of at most `max_size`: so a caller waits for the run under way and for its own, unless more has
    queued than one batch takes. An exception of `run` is raised in each caller of the batch.

    A caller that is cancelled leaves the queue if its item has not been sent, and breaks nothing off if others have
    theirs in the same batch. A run that takes longer than `PATIENCE` stops holding up the queue: the next leader runs
    beside it.
    """

    def __init__(self, run: AsyncRun[Item, Result], *, max_items: int, max_size: int) -> None:
        self._run = run
        self._max_items = max_items
        self._max_size = max_size
        self._mutex = Mutex()
        self._queue: deque[AsyncCall[Item, Result]] = deque()
        self._leader: AsyncCall[Item, Result] | None = None
        self._led_since = 0.0

    async def call(self, item: Item, size: int = 1) -> Result:
        """Have `item` run, alone or with others, and return its result."""
        call: AsyncCall[Item, Result] = AsyncCall(item, size)
        with self._mutex:
            if self._leader is None:
                self._appoint(call)
            else:
                call.woken = AsyncOneShotEvent()
                self._queue.append(call)
        if not call.leads:
            try:
                while not (await call.woken.wait(PATIENCE) or call.settled):
                    self._lose_patience(call)
            except BaseException:
                self._leave(call)
                raise
            if not call.leads:
                return call.outcome()
        if self._queue:  # without the mutex: who comes just now waits for the next run
            batch = [call]
            await async_shielded(partial(self._run_batch, batch), partial(self._conclude, batch))
            return call.outcome()
        try:
            [result] = await self._run([item])
        finally:
            self._leave(call)
        return result

    def _appoint(self, call: AsyncCall[Item, Result]) -> None:
        self._leader, self._led_since = call, monotonic()
        call.leads = True

    def _lose_patience(self, call: AsyncCall[Item, Result]) -> None:
        """Make a queued call the leader, beside the one who has not returned for too long."""
        with self._mutex:
            if monotonic() - self._led_since > PATIENCE and call in self._queue:
                self._queue.remove(call)
                self._appoint(call)
                call.woken.set()

    def _leave(self, call: AsyncCall[Item, Result]) -> None:
        """Let go of a call whose caller is leaving: out of the queue, or from the lead, which goes to the next."""
        with self._mutex:
            if self._leader is call:
                self._leader = None
                if self._queue:
                    successor = self._queue.popleft()
                    self._appoint(successor)
                    successor.woken.set()
            elif call in self._queue:
                self._queue.remove(call)

    async def _run_batch(self, batch: list[AsyncCall[Item, Result]]) -> None:
        """Add to a batch what has queued, and run it. Whoever is added is sure to be concluded."""
        with self._mutex:
            size = batch[0].size
            while self._queue and len(batch) < self._max_items and size + self._queue[0].size <= self._max_size:
                batch.append(self._queue[0])
                size += self._queue.popleft().size
        try:
            results = await self._run([call.item for call in batch])
        except Exception as error:
            for call in batch:
                call.fail(error)
        else:
            for call, result in zip(batch, results, strict=True):
                call.settle(result)

    def _conclude(self, batch: Sequence[AsyncCall[Item, Result]]) -> None:
        """Hand on first, so that the next batch is under way while this one's callers wake up."""
        leader, *followers = batch
        self._leave(leader)
        for call in followers:
            call.woken.set()
