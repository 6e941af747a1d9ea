"""Combine simultaneous calls: the calls that queue during one run share the next run."""

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

TAKEOVER_TIMEOUT = 0.1  # seconds that a run may take before a queued call becomes an additional leader


class AsyncRun(Protocol[ItemIn, ResultOut]):
    """Processes the items of a batch and returns their results, in the same order."""

    async def __call__(self, items: Sequence[ItemIn], /) -> Sequence[ResultOut]: ...


class AsyncRunAlone(Protocol[ItemIn, ResultOut]):
    """Processes a single item and returns its result."""

    async def __call__(self, item: ItemIn, /) -> ResultOut: ...


class AsyncCall(Generic[Item, Result]):
    """The item of a queued caller, and its result after a run has returned."""

    __slots__ = ("_results", "is_leader", "item", "size", "woken")

    def __init__(self, item: Item, size: int) -> None:
        self.woken = AsyncOneShotEvent()
        self.item = item
        self.size = size
        self.is_leader = False
        self._results: Sequence[Result] | Exception = ()

    @property
    def done(self) -> bool:
        return self._results != ()

    def set_result(self, result: Result) -> None:
        self._results = (result,)

    def set_exception(self, error: Exception) -> None:
        self._results = error

    def result(self) -> Result:
        """Return the result, or raise a copy of the error, so that each caller raises its own instance."""
        if isinstance(self._results, Exception):
            raise copy_error(self._results) from self._results
        if not self._results:
            raise AibindError(
                "this call shared a statement with others, which was interrupted: it may or may not have taken effect"
            )
        return self._results[0]


class AsyncCombiner(Generic[Item, Result]):
    """Runs the items of simultaneous calls in batches.

    - The first caller becomes the leader and runs its own item at once. Later callers queue.
    - When a run returns, the caller that has waited longest becomes the leader and runs the queue as one batch. The
      other callers of the batch are its followers. A caller waits for at most the current run and its own, unless the
      queue exceeds a batch.
    - An exception of `run_batch` is raised in every caller of the batch.
    - A cancelled caller leaves the queue. If its batch is running, the batch continues for the others.
    - If a run exceeds `TAKEOVER_TIMEOUT`, the next caller becomes a leader as well, and runs at the same time.

    Args:
        run_alone: Processes the item of a caller that shares its run with no other.
        run_batch: Processes the items of a batch.
        max_items: The maximum number of items of a batch.
        max_size: The maximum sum of their sizes, in the unit of `size` of `call`.
    """

    def __init__(
        self,
        run_alone: AsyncRunAlone[Item, Result],
        run_batch: AsyncRun[Item, Result],
        *,
        max_items: int,
        max_size: int,
    ) -> None:
        self._run_alone = run_alone
        self._run_batch = run_batch
        self._max_items = max_items
        self._max_size = max_size
        self._mutex = Mutex()
        self._queue: deque[AsyncCall[Item, Result]] = deque()
        self._leader: object = None  # the item of a caller that found the combiner idle, or a call of the queue
        self._led_since = 0.0
        self.combined = 0  # calls that have shared a run with others

    async def call(self, item: Item, size: int = 1) -> Result:
        """Run `item`, alone or in a batch, and return its result.

        Args:
            item: The item.
            size: The size of the item, for `max_size`; 1 by default.

        Raises:
            AibindError: The run was interrupted, so the outcome is unknown.
            Exception: A copy of the error of the run.
        """
        call: AsyncCall[Item, Result] | None = None
        with self._mutex:
            if self._leader is None:
                self._leader, self._led_since = item, monotonic()
            else:
                call = AsyncCall(item, size)
                self._queue.append(call)
        leader: object = item
        if call is not None:
            try:
                while not (await call.woken.wait(TAKEOVER_TIMEOUT) or call.done):
                    self._take_over(call)
            except BaseException:
                self._leave(call)
                raise
            if not call.is_leader:
                return call.result()
            if self._queue:  # read without the mutex: a call that is queued later runs in the next batch
                batch = [call]
                await async_shielded(partial(self._run_queue, batch), partial(self._finish_batch, batch))
                return call.result()
            leader = call
        try:
            return await self._run_alone(item)
        finally:
            self._hand_over(leader)

    def _make_leader(self, call: AsyncCall[Item, Result]) -> None:
        self._leader, self._led_since = call, monotonic()
        call.is_leader = True

    def _take_over(self, call: AsyncCall[Item, Result]) -> None:
        """Make a queued call the leader if the current leader exceeds the takeover timeout."""
        with self._mutex:
            if monotonic() - self._led_since > TAKEOVER_TIMEOUT and call in self._queue:
                self._queue.remove(call)
                self._make_leader(call)
                call.woken.set()

    def _leave(self, call: AsyncCall[Item, Result]) -> None:
        """Remove a call whose caller was interrupted. If it has become the leader, hand over to the next call."""
        with self._mutex:
            if call in self._queue:
                self._queue.remove(call)
        self._hand_over(call)

    def _hand_over(self, leader: object) -> None:
        """Make the next call the leader, unless another one has taken over in the meantime."""
        with self._mutex:
            if self._leader is leader:
                self._leader = None
                if self._queue:
                    successor = self._queue.popleft()
                    self._make_leader(successor)
                    successor.woken.set()

    async def _run_queue(self, batch: list[AsyncCall[Item, Result]]) -> None:
        """Move queued calls into the batch and run it. `_finish_batch` runs for every added call."""
        with self._mutex:
            size = batch[0].size
            while self._queue and len(batch) < self._max_items and size + self._queue[0].size <= self._max_size:
                batch.append(self._queue[0])
                size += self._queue.popleft().size
            if len(batch) > 1:
                self.combined += len(batch)
        try:
            results = await self._run_batch([call.item for call in batch])
        except Exception as error:
            for call in batch:
                call.set_exception(error)
        else:
            for call, result in zip(batch, results, strict=True):
                call.set_result(result)

    def _finish_batch(self, batch: Sequence[AsyncCall[Item, Result]]) -> None:
        """Hand over to the next call, then wake the followers, so that the next batch starts while they wake up."""
        leader, *followers = batch
        self._hand_over(leader)
        for call in followers:
            call.woken.set()
