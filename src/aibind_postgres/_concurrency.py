"""The only place where the two flavours differ: primitives in pairs, `AsyncX` or `async_x` beside `X` or `x`.

A `Mutex` serves both flavours: it guards state for a few instructions and is never held across an `await`.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary, ref

T = TypeVar("T")

Mutex = threading.Lock
AsyncLock = asyncio.Lock
Lock = threading.Lock
Event = threading.Event


class AsyncEvent:
    """Twin of `threading.Event`: unlike asyncio's own, its `wait` takes a timeout and says whether it was set.

    Each waiter has a future of its own instead of a task around `asyncio.wait_for`, which before Python 3.12 could
    swallow a cancellation that came together with the event.
    """

    def __init__(self) -> None:
        self._set = False
        self._waiters: set[asyncio.Future[bool]] = set()

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for waiter in self._waiters:
            _resolve(waiter, True)

    def clear(self) -> None:
        self._set = False

    async def wait(self, timeout: float | None = None) -> bool:
        if self._set:
            return True
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters.add(waiter)
        timer = None if timeout is None else loop.call_later(timeout, _resolve, waiter, False)
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)
            if timer is not None:
                timer.cancel()


class AsyncOneShotEvent:
    """An event that is set once and waited for by one task; made for many of them.

    A wait may time out early: one timer serves all that wait in an event loop, for the same time, since a timer for
    each would cost more than the rest of it.
    """

    # By weak references, since a future refers to its loop, and nothing here is to keep one alive.
    _waiting: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, list[ref[asyncio.Future[bool]]]]] = (
        WeakKeyDictionary()
    )

    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[bool] | None = None

    def set(self) -> None:
        self._set = True
        if self._waiter is not None:
            _resolve(self._waiter, True)

    async def wait(self, timeout: float) -> bool:
        if self._set:
            return True
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        waiting = self._waiting.get(loop)
        if waiting is None:
            waiting = self._waiting[loop] = []
            loop.call_later(timeout, self._time_out, loop)
        waiting.append(ref(self._waiter))
        return await self._waiter

    @classmethod
    def _time_out(cls, loop: asyncio.AbstractEventLoop) -> None:
        for reference in cls._waiting.pop(loop):
            if (waiter := reference()) is not None:
                _resolve(waiter, False)


class OneShotEvent:
    """An event that is set once and waited for by one thread: a tenth of the cost of `threading.Event`."""

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        self._unset.release()

    def wait(self, timeout: float) -> bool:
        return self._unset.acquire(timeout=timeout)


def _resolve(waiter: asyncio.Future[bool], result: bool) -> None:
    if not waiter.done():
        waiter.set_result(result)


class AsyncWorker:
    """A running task, seen as a thread."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        self._task.cancel()

    def is_alive(self) -> bool:
        """Say whether it runs, or will. What is cancelled before it has begun ends without its `finally`."""
        return not self._task.done()

    async def join(self, timeout: float | None = None) -> None:
        await asyncio.wait([self._task], timeout=timeout)


Worker = threading.Thread


def async_spawn(run: Callable[[], Coroutine[Any, Any, None]], name: str, *, inherit: bool = False) -> AsyncWorker:
    """Run `run` in a task of its own, outside the context (variables, tracing) of whoever happened to start it.

    With `inherit` it gets that context: what it runs belongs to the one who starts it.
    """
    loop = asyncio.get_running_loop()
    context = copy_context() if inherit else Context()
    # Not by the loop's factory, which may start it at once: whoever spawns may hold a mutex.
    return AsyncWorker(context.run(lambda: asyncio.Task(run(), loop=loop, name=name)))


def spawn(run: Callable[[], None], name: str, *, inherit: bool = False) -> Worker:
    """Run `run` in a daemon thread, with `inherit` in the context of the caller."""
    context = copy_context() if inherit else Context()
    thread = threading.Thread(target=context.run, args=[run], name=name, daemon=True)
    thread.start()
    return thread


def async_running_loop() -> object:
    """Return what tasks cannot leave: the event loop that runs them."""
    return asyncio.get_running_loop()


def running_loop() -> object:
    """Return nothing: threads may go anywhere."""
    return None


_shielded: set[asyncio.Task[None]] = set()  # asyncio itself holds its tasks by weak references


async def async_shielded(run: Callable[[], Coroutine[Any, Any, None]], over: Callable[[], None] | None = None) -> None:
    """Run `run` to its end, also if the caller is cancelled meanwhile, and call `over` when it has ended in any way.

    `over` is called even if the event loop is shut down before `run` could begin.
    """

    def conclude(task: asyncio.Task[None] | None = None) -> None:
        if task is not None:
            _shielded.discard(task)
        if over is not None:
            over()

    if isinstance(sys.exc_info()[1], GeneratorExit):  # the caller is thrown away, and its event loop is no more
        try:
            await run()
        finally:
            conclude()
        return
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12) and not isinstance(sys.exc_info()[1], asyncio.CancelledError):
        # What has nothing to wait for is done at once, and costs no turns of the loop. Not after a cancellation: if all
        # tasks are cancelled, all are to know it first.
        task = asyncio.Task(run(), loop=loop, eager_start=True)
        if task.done():
            conclude()
            task.result()
            return
    else:
        task = loop.create_task(run())
    _shielded.add(task)
    task.add_done_callback(conclude)
    await asyncio.shield(task)


def shielded(run: Callable[[], None], over: Callable[[], None] | None = None) -> None:
    """Run `run`, and call `over` when it has ended in any way."""
    try:
        run()
    finally:
        if over is not None:
            over()


async def async_take(
    take: Callable[[], Coroutine[Any, Any, T]], give_back: Callable[[T], Coroutine[Any, Any, None]]
) -> T:
    """Return what `take` gives; if the caller has been cancelled meanwhile, give it back and let him know.

    A pool waits by `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes together with what
    is waited for: a reader who is not wanted any more would read on for ever.
    """
    if sys.version_info >= (3, 12):
        return await take()
    if sys.version_info >= (3, 11):
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        taken = await take()
        if task.cancelling() == cancelled:
            return taken
        await async_shielded(partial(give_back, taken))
        raise asyncio.CancelledError
    taking = asyncio.get_running_loop().create_task(take())
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:

        async def undo() -> None:
            taking.cancel()
            await asyncio.wait([taking])
            if not taking.cancelled() and taking.exception() is None:
                await give_back(taking.result())

        await async_shielded(undo)
        raise


def take(take: Callable[[], T], give_back: Callable[[T], None]) -> T:
    """Return what `take` gives."""
    return take()


def async_is_source(source: object) -> bool:
    """Say whether `async for` takes this."""
    return hasattr(source, "__aiter__")


def is_source(source: object) -> bool:
    """Say whether `for` takes this, and not letter by letter."""
    return hasattr(source, "__iter__") and not isinstance(source, (str, bytes))


def async_interrupt(worker: AsyncWorker, source: object) -> bool:
    """Interrupt a worker that waits for the next item of a source. False: it is for the worker to close that."""
    worker.cancel()
    return False


def interrupt(worker: Worker, source: object) -> bool:
    """Close a source for which a worker waits, and say whether that was done."""
    close = getattr(source, "close", None)
    if close is None:
        return False
    try:
        close()
    except Exception:
        return False
    return True


async def async_call_or_await(callback: Callable[..., Any], *args: object) -> Any:
    """Call a callback of either flavour and return its result."""
    result = callback(*args)
    return await result if inspect.isawaitable(result) else result


def call_or_await(callback: Callable[..., Any], *args: object) -> Any:
    """Call a callback and return its result; raise `TypeError` for an awaitable, which would count as true."""
    result = callback(*args)
    if inspect.iscoroutine(result):
        result.close()
    if inspect.isawaitable(result):
        raise TypeError("a callback of this flavour must not be asynchronous")
    return result


def async_at_end_of_loop(run: Callable[[], Coroutine[Any, Any, None]], unless: AsyncEvent) -> None:
    """Have `run` called when the event loop ends, unless an event is set before.

    `asyncio.run` cancels all tasks and waits for them. What they have left to do is done first; the workers that they
    begin then, nobody would wait for, so those are cancelled.
    """

    async def attend() -> None:
        try:
            await unless.wait()
        except asyncio.CancelledError:
            # But for the pools, whose workers wait for `run`, and those who wait as this one does.
            if tasks := {task for task in asyncio.all_tasks() if " of aibind_postgres" not in task.get_name()}:
                await asyncio.wait(tasks)
            if workers := {task for task in asyncio.all_tasks() if task.get_name().startswith("aibind_postgres-")}:
                for worker in workers:
                    worker.cancel()
                await asyncio.wait(workers)
            await run()
            raise

    async_spawn(attend, "end of the loop of aibind_postgres")


def at_end_of_loop(run: Callable[[], None], unless: Event) -> None:
    """Do nothing: threads have no event loop that ends."""


def async_at_exit(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do nothing: an event loop that ends cancels its tasks, and lets them do what they have left to do."""


def at_exit(run: Callable[[], None]) -> None:
    """Have `run` called when the interpreter exits, while the threads that it would not wait for still run."""
    atexit.register(run)


def async_is_flavour(call: object) -> bool:
    """Say whether this can be called by code of the asynchronous flavour."""
    return inspect.iscoroutinefunction(call)


def is_flavour(call: object) -> bool:
    """Say whether this can be called by code of the synchronous flavour."""
    return callable(call) and not inspect.iscoroutinefunction(call)
