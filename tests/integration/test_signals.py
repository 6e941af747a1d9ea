"""Handlers of signals that raise, as with a time limit by SIGALRM."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from psycopg_pool import ConnectionPool
from support.concurrency import until

import aibind_postgres
from aibind_postgres import PostgresStreamStore

PACKAGE = str(Path(aibind_postgres.__file__).parent)
CONNECTIONS = 3
INTERRUPTIONS = 60


class InterruptionError(Exception):
    """Raised by the handler."""


@pytest.fixture
def armed() -> Iterator[list[bool]]:
    """Holds an element while the next SIGALRM raises in the code of the package."""
    armed: list[bool] = []

    def handle(_: int, frame: FrameType | None) -> None:
        # Not in other packages: psycopg_pool itself loses connections then, and breaks its locks.
        if armed and frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            armed.clear()
            raise InterruptionError

    previous = signal.signal(signal.SIGALRM, handle)
    yield armed
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("autocommit", [True, False])
def test_interrupted_call_returns_its_connection(dsn, tables, armed, autocommit):
    options = {"autocommit": autocommit}
    with ConnectionPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs=options, timeout=10) as pool:
        pool.wait()
        with PostgresStreamStore(pool, **tables) as store:
            interrupted = 0
            while interrupted < INTERRUPTIONS:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-3))
                try:
                    store.get_status("a")
                except InterruptionError:
                    interrupted += 1
                armed.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
            until(lambda: pool.get_stats()["pool_available"] == CONNECTIONS)
            with pool.connection() as connection:
                assert connection.autocommit is autocommit
