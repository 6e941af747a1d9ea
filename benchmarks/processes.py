"""Tasks and child processes of the benchmarks, and the memory of a process."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any


async def run_all(*coroutines: Awaitable[None]) -> None:
    """Run coroutines until all have ended or one has failed. Cancel the rest."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Pipe]:
    """Run `target(pipe, *arguments)` in a new process, and yield the other end of its pipe."""
    spawning = get_context("spawn")
    ours, theirs = spawning.Pipe()
    child = spawning.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()  # otherwise recv() would hang if the child dies
    try:
        yield ours
    finally:
        ours.close()
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()


def peak_memory() -> float:
    """Return the peak memory of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux a process inherits ru_maxrss from its parent.
        [peak] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(peak.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 1024
