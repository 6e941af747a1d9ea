"""Concurrent calls for tests, in pairs: tasks for the async flavour, threads for the sync flavour."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

TIMEOUT = 30  # seconds after which a call counts as hanging, and a condition as false

async_sleep = asyncio.sleep
sleep = time.sleep


async def async_until(condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
    """Wait until a condition is true. Fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition is still false after {timeout} seconds"
        await async_sleep(0.002)


def until(condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition is still false after {timeout} seconds"
        sleep(0.002)


async def async_gather(*calls: Callable[[], Awaitable[Any]], errors: bool = False) -> list[Any]:
    """Run all calls concurrently and return their results. With `errors`, return exceptions instead of raising them."""
    return list(await asyncio.gather(*(call() for call in calls), return_exceptions=errors))


def gather(*calls: Callable[[], Any], errors: bool = False) -> list[Any]:
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    futures = [_start_thread(partial(run, call)) for call in calls]
    results = [future.exception() or future.result() for future in futures]
    for result in results:
        if isinstance(result, BaseException) and not errors:
            raise result
    return results


def _start_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run a call in a daemon thread, so that a call that hangs does not keep the process from exiting."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class AsyncBackground:
    """A call that runs concurrently with the test. Leaving the block waits for it; an exception cancels it first."""

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self._call = call

    async def __aenter__(self) -> AsyncBackground:
        self._task = asyncio.ensure_future(self._call())
        return self

    async def __aexit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self._task.cancel()
        await asyncio.wait([self._task])

    async def result(self, timeout: float = TIMEOUT) -> Any:
        return await asyncio.wait_for(asyncio.shield(self._task), timeout)


class Background:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def __enter__(self) -> Background:
        self._future = _start_thread(self._call)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            wait([self._future])

    def result(self, timeout: float = TIMEOUT) -> Any:
        return self._future.result(timeout)


def async_workers() -> list[str]:
    """Return the names of the tasks of the package and of its pools."""
    return [name for task in asyncio.all_tasks() if "aibind_postgres" in (name := task.get_name())]


# Threads that outlive stores: one of the process, and watchdogs that end some seconds after the last reader.
OUTLIVING = ("aibind_postgres-large", "aibind_postgres-send-timeout")


def workers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if "aibind_postgres" in name and not name.startswith(OUTLIVING)]


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python subprocess that runs `code`."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
