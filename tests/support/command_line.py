"""Runs the command `aibind-postgres` in processes of its own, with warnings as errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

COMMAND = [sys.executable, "-W", "error", "-m", "aibind_postgres.cli"]

# PYTHONUNBUFFERED would hide output that a command forgets to flush.
UNSET = ("DATABASE_URL", "XDG_DATA_HOME", "PYTHONUNBUFFERED")


def environment(dsn: str | None, **extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    return {**inherited, **({"DATABASE_URL": dsn} if dsn else {}), **extra}


def run(
    *arguments: str, stdin: bytes = b"", dsn: str | None = None, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    result = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, env=environment(dsn, **variables), timeout=60
    )
    assert b"Traceback" not in result.stderr, result.stderr.decode()
    return result


def in_parallel(commands: Iterable[list[str]]) -> Callable[..., list[subprocess.CompletedProcess[bytes]]]:
    """Return a function that runs all commands concurrently, each with the options of the call."""

    def run_all(**options: Any) -> list[subprocess.CompletedProcess[bytes]]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda arguments: run(*arguments, **options), commands))

    return run_all


def start(*arguments: str, dsn: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, env=environment(dsn))
