"""Concurrency primitives in pairs: `AsyncX` and `async_x` for asyncio, `X` and `x` for threads.

All other code is the same for both flavours. So is `Mutex`: it guards state for a few instructions, and is never held
across an `await`. This module imports only the standard library.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
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
    """An event like `threading.Event`: unlike asyncio's, `wait` has a timeout and returns whether the event is set.

    It does not use `asyncio.wait_for`, which creates a task, and may swallow a cancellation before Python 3.12.
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
    """An event that is set once, for one waiting task.

    All waiters of an event loop share one timer, since one timer for each would cost more than the rest of the wait.
    They must therefore use the same timeout, and may time out early.
    """

    # The references to futures are weak, since a future refers to its loop and must not keep the loop alive.
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
    """An event that is set once, for one waiting thread. It costs a tenth of a `threading.Event`."""

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
    """A task with the interface of `threading.Thread`."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        self._task.cancel()

    def is_alive(self) -> bool:
        """Return True until the task has ended. The task cannot report this: cancelled early, it never runs."""
        return not self._task.done()

    async def join(self, timeout: float | None = None) -> None:
        await asyncio.wait([self._task], timeout=timeout)


Worker = threading.Thread


def async_spawn(run: Callable[[], Coroutine[Any, Any, None]], name: str, *, inherit: bool = False) -> AsyncWorker:
    """Run `run` in a new task.

    Args:
        run: The coroutine function.
        name: The name of the task.
        inherit: Whether to copy the caller's context variables, for work on the caller's behalf; False by default. A
            shared worker has an empty context, so that it does not keep the data of the request that started it.
    """
    loop = asyncio.get_running_loop()
    context = copy_context() if inherit else Context()
    # The loop's task factory may run the first step at once, while the caller holds a mutex: do not use it.
    return AsyncWorker(context.run(lambda: asyncio.Task(run(), loop=loop, name=name)))


def spawn(run: Callable[[], None], name: str, *, inherit: bool = False) -> Worker:
    """Run `run` in a new daemon thread.

    Args:
        run: The function.
        name: The name of the thread.
        inherit: Whether to copy the caller's context variables, as for `async_spawn`; False by default.
    """
    context = copy_context() if inherit else Context()
    thread = threading.Thread(target=context.run, args=[run], name=name, daemon=True)
    thread.start()
    return thread


def async_after_cancellation(worker: AsyncWorker, run: Callable[[], None], pause: float) -> None:
    """Call `run` when a worker has been cancelled, `pause` seconds later.

    A timer does this, and not a task: when an event loop ends, it cancels all tasks, and drops its timers.
    """

    def schedule(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            task.get_loop().call_later(pause, run)

    worker._task.add_done_callback(schedule, context=Context())


def after_cancellation(worker: Worker, run: Callable[[], None], pause: float) -> None:
    """Do nothing, since threads cannot be cancelled."""


def async_running_loop() -> object:
    """Return the running event loop."""
    return asyncio.get_running_loop()


def running_loop() -> object:
    """Return None, since threads have no event loop."""
    return None


_shielded: set[asyncio.Task[None]] = set()  # asyncio holds only weak references to tasks


async def async_shielded(
    run: Callable[[], Coroutine[Any, Any, None]], on_done: Callable[[], None] | None = None
) -> None:
    """Run `run` to its end, even if the caller is cancelled.

    Args:
        run: The coroutine function.
        on_done: Called when `run` has returned or raised, or when the event loop ends before the first step of `run`.
            Default: no callback.
    """

    def finish(task: asyncio.Task[None] | None = None) -> None:
        if task is not None:
            _shielded.discard(task)
        if on_done is not None:
            on_done()

    if isinstance(sys.exc_info()[1], GeneratorExit):  # the coroutine is being finalised; no loop runs
        try:
            await run()
        finally:
            finish()
        return
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12) and not isinstance(sys.exc_info()[1], asyncio.CancelledError):
        # Saves an iteration of the loop if `run` never waits. Not for a cancelled caller: when a loop ends, it must
        # cancel all tasks before one of them continues.
        task = asyncio.Task(run(), loop=loop, eager_start=True)
        if task.done():
            finish()
            task.result()
            return
    else:
        task = loop.create_task(run())
    _shielded.add(task)
    task.add_done_callback(finish)
    await asyncio.shield(task)


def shielded(run: Callable[[], None], on_done: Callable[[], None] | None = None) -> None:
    """Run `run`, and call `on_done` when it has returned or raised."""
    try:
        run()
    finally:
        if on_done is not None:
            on_done()


def async_is_source(source: object) -> bool:
    """Return True if `async for` accepts the object."""
    return hasattr(source, "__aiter__")


def is_source(source: object) -> bool:
    """Return True if `for` accepts the object. Return False for a text, which would yield single characters."""
    return hasattr(source, "__iter__") and not isinstance(source, (str, bytes))


def async_interrupt(worker: AsyncWorker, source: object) -> bool:
    """Interrupt a worker that waits for the next item of a source. Return False, since the worker closes it."""
    worker.cancel()
    return False


def interrupt(worker: Worker, source: object) -> bool:
    """Close a source, so that a worker stops waiting for the next item. Return True if the source was closed."""
    close = getattr(source, "close", None)
    if close is None:
        return False
    try:
        close()
    except Exception:
        return False
    return True


async def async_join_or_cancel(worker: AsyncWorker, timeout: float) -> None:
    """Wait for a worker to end. After `timeout` seconds, cancel it."""
    try:
        await worker.join(timeout)
    finally:
        worker.cancel()
    await worker.join(timeout)


def join_or_cancel(worker: Worker, timeout: float) -> None:
    """Wait for a worker to end, for up to `timeout` seconds. A thread cannot be cancelled."""
    worker.join(timeout)


async def async_call_or_await(callback: Callable[..., Any], *args: object) -> Any:
    """Call a function or a coroutine function and return its result."""
    result = callback(*args)
    return await result if inspect.isawaitable(result) else result


def call_or_await(callback: Callable[..., Any], *args: object) -> Any:
    """Call a callback and return its result.

    Raises:
        TypeError: The result is awaitable. Nothing would await it, and it would count as true.
    """
    result = callback(*args)
    if inspect.iscoroutine(result):
        result.close()
    if inspect.isawaitable(result):
        raise TypeError(f"the callback must not be asynchronous: {callback!r} returned an awaitable")
    return result


LARGE = 100_000  # characters of JSON, which take about a millisecond
_large_work = ThreadPoolExecutor(1, "aibind_postgres-large")  # one thread, to bound the memory


def _renew_large_work() -> None:
    global _large_work
    _large_work = ThreadPoolExecutor(1, "aibind_postgres-large")


if hasattr(os, "register_at_fork"):  # a forked process has no other threads
    os.register_at_fork(after_in_child=_renew_large_work)


async def async_run_large(size: int, run: Callable[..., T], *args: object) -> T:
    """Call a function. If `size` is at least `LARGE`, call it in a thread, one call after the other."""
    if size < LARGE:
        return run(*args)
    return await asyncio.get_running_loop().run_in_executor(_large_work, partial(run, *args))


def run_large(size: int, run: Callable[..., T], *args: object) -> T:
    """Call a function. Threads have no event loop that it could block."""
    return run(*args)


def async_at_exit(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do nothing: at its end, an event loop cancels its tasks and waits for them."""


def at_exit(run: Callable[[], None]) -> None:
    """Call `run` when the interpreter exits, while daemon threads still run."""
    atexit.register(run)


def async_matches_flavour(method: object) -> bool:
    """Return True for a coroutine function."""
    return inspect.iscoroutinefunction(method)


def matches_flavour(method: object) -> bool:
    """Return True for a callable that is not a coroutine function."""
    return callable(method) and not inspect.iscoroutinefunction(method)
