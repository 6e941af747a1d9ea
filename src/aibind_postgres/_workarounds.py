"""Code for bugs and limits of other projects. Each entry names the affected versions and the condition for its removal.

`_concurrency` describes the pairs `async_x`/`x`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import psycopg
from psycopg import capabilities
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from ._concurrency import AsyncEvent, Event, async_shielded, async_spawn

# asyncio, before Python 3.12: `wait_for` swallows a cancellation that arrives together with the result.
# https://github.com/python/cpython/issues/86296
# psycopg_pool waits for a connection with `wait_for`, so a cancelled reader would continue to read.
# Remove when Python 3.12 is the oldest supported version.


async def async_checkout(pool: AsyncConnectionPool[Any], timeout: float) -> psycopg.AsyncConnection[Any]:
    """Get a connection of a pool. If the caller is cancelled, put the connection back and raise `CancelledError`."""
    connection: psycopg.AsyncConnection[Any]
    if sys.version_info >= (3, 12):
        connection = await pool.getconn(timeout)
        return connection
    if sys.version_info >= (3, 11):
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        connection = await pool.getconn(timeout)
        if task.cancelling() == cancelled:
            return connection
        await async_shielded(partial(pool.putconn, connection))
        raise asyncio.CancelledError
    getting = asyncio.get_running_loop().create_task(pool.getconn(timeout))
    try:
        return await asyncio.shield(getting)
    except asyncio.CancelledError:

        async def undo() -> None:
            getting.cancel()
            await asyncio.wait([getting])
            if not getting.cancelled() and getting.exception() is None:
                await pool.putconn(getting.result())

        await async_shielded(undo)
        raise


def checkout(pool: ConnectionPool[Any], timeout: float) -> psycopg.Connection[Any]:
    """Get a connection of a pool. Threads cannot be cancelled."""
    connection: psycopg.Connection[Any] = pool.getconn(timeout)
    return connection


# psycopg_pool, all versions: a pool loses a connection if a signal handler raises while the connection is put back.
# Remove when `putconn` can be repeated.


async def async_put_again(put: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do nothing: asyncio handles signals between the steps of tasks, and a shielded `putconn` continues."""


def put_again(put: Callable[[], None]) -> None:
    """Put a connection back unless it has been put back."""
    with suppress(ValueError):  # it is in the pool
        put()


# psycopg_pool, from 3.2.8 to at least 3.3.3: a worker that is cancelled while it connects logs the cancellation
# and waits for its next task. `asyncio.run` cancels all tasks and waits for them, so it would never return.
# Remove when a pool's workers end on the first cancellation.


def async_at_end_of_loop(run: Callable[[], Coroutine[Any, Any, None]], unless: AsyncEvent) -> None:
    """Call `run` when the event loop cancels its tasks at its end, unless the event `unless` is set before.

    `run` is called after all other tasks have finished, except the workers of pools, which wait for `run`. Workers of
    this package that were started in the meantime are cancelled, since `asyncio.run` does not wait for them.
    """

    async def wait_for_end() -> None:
        try:
            await unless.wait()
        except asyncio.CancelledError:
            # This text is in the names of the workers of pools, and of other tasks like this one.
            if tasks := {task for task in asyncio.all_tasks() if " of aibind_postgres" not in task.get_name()}:
                await asyncio.wait(tasks)
            if workers := {task for task in asyncio.all_tasks() if task.get_name().startswith("aibind_postgres-")}:
                for worker in workers:
                    worker.cancel()
                await asyncio.wait(workers)
            await run()
            raise

    async_spawn(wait_for_end, "end of the loop of aibind_postgres")


def at_end_of_loop(run: Callable[[], None], unless: Event) -> None:
    """Do nothing, since threads have no event loop."""


# psycopg_pool, all versions: `close` waits for the workers of the pool. If the end of an event loop has cancelled them,
# it raises before it has closed the connections.
# Remove when `close` closes the connections in any case.


async def async_close_pool(pool: AsyncConnectionPool[Any]) -> None:
    """Close a pool and its idle connections."""
    connections = list(pool._pool)
    try:
        await pool.close()
    finally:
        for connection in connections:
            await connection.close()


def close_pool(pool: ConnectionPool[Any]) -> None:
    """Close a pool. Nothing cancels its threads."""
    pool.close()


# psycopg_pool, all versions: `getconn` returns idle connections that the server has closed. Its `check` callback costs
# a round trip for each use. After a restart of the server, each idle connection would fail one call.
# https://github.com/psycopg/psycopg/issues/656
# Remove when a pool discards closed connections without a round trip.


def is_closed_by_server(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Return True if the server has closed an idle connection. Needs no round trip."""
    try:
        connection.pgconn.consume_input()  # may read only the last message of the server
        connection.pgconn.consume_input()  # reads the end of the connection
    except psycopg.OperationalError:
        return True
    return False


# libpq, before 17: its cancel request has no timeout, and `cancel_safe` of psycopg falls back to it.
# https://github.com/psycopg/psycopg/issues/534
# Remove when psycopg requires libpq 17.


def can_cancel_in_time() -> bool:
    """Return True if `cancel_safe` obeys its timeout."""
    return capabilities.has_cancel_safe()


# asgiref, before 3.13: a nested `ThreadSensitiveContext` has no effect, and Django enters one around each request. The
# thread in which it runs `sync_to_async` calls ends with the request, but the source of a stream continues.
# Remove when asgiref 3.13 is the oldest supported version, which needs Python 3.11 or later: then enter
# `ThreadSensitiveContext(executor=…)` with an executor of one thread, and call `at_end` in that thread.


@asynccontextmanager
async def separate_asgiref_thread(at_end: Callable[[], object]) -> AsyncIterator[None]:
    """Run `sync_to_async` calls in a thread of their own. It calls `at_end` before it ends."""
    from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext  # comes with Django

    context = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(context)
    outer = getattr(AsyncToSync.executors, "current", None)  # set by synchronous middleware, and takes precedence
    AsyncToSync.executors.current = None
    try:
        yield
    finally:
        AsyncToSync.executors.current = outer
        SyncToAsync.thread_sensitive_context.reset(token)
        if (executor := SyncToAsync.context_to_thread_executor.pop(context, None)) is not None:
            executor.submit(at_end)
            executor.shutdown(wait=False)
