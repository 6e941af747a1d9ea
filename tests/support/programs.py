"""Functions that run in subprocesses, which a test may kill, and the values that they report until then."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT = 90  # seconds after which a process without a report, or without an end, counts as hanging
BATCH = 7  # chunks per call of a producer

# The main module of a subprocess. It reports the name of the error that ends the function, if any.
MAIN = """
import asyncio, inspect, runpy, sys
_, tests, file, function, *arguments = sys.argv
sys.path.insert(0, tests)
from aibind_postgres import AibindError
from support.programs import report
try:
    result = runpy.run_path(file)[function](*arguments)
    if inspect.iscoroutine(result):
        asyncio.run(result)
except AibindError as error:
    report(type(error).__name__)
"""


def report(value: object) -> None:
    """Send a value to the test. It arrives even if this process is killed right after the call."""
    print(json.dumps(value), flush=True)


def text_of(name: str, seq: int) -> str:
    """Return the text of a producer's chunk with this sequence number."""
    return f"{name} {seq} " * 20


class Program:
    """A subprocess that runs one function."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    def reports(self) -> list[Any]:
        """Return the values reported so far."""
        return [json.loads(line) for line in self._output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, count: int) -> None:
        """Wait until the program has reported `count` values."""
        deadline = time.monotonic() + TIMEOUT
        while len(reports := self.reports()) < count:
            assert self.process.poll() is None, f"the program has ended; its last report is {reports[-1:]}"
            assert time.monotonic() < deadline, f"the program hangs; its last report is {reports[-1:]}"
            time.sleep(0.01)

    def end(self) -> list[Any]:
        """Wait until the program ends, and return all reported values."""
        self.process.wait(TIMEOUT)
        return self.reports()

    def kill(self) -> list[Any]:
        self.process.kill()
        return self.end()


@contextmanager
def program(folder: Path, file: Path, function: str, *arguments: str) -> Iterator[Program]:
    """Run a function of a file in a subprocess. Leaving the block kills it."""
    tests = str(Path(__file__).parent.parent)
    output = folder / f"{time.monotonic_ns()}.txt"
    command = [sys.executable, "-c", MAIN, tests, str(file), function, *arguments]
    with output.open("wb") as stdout, subprocess.Popen(command, stdout=stdout) as process:
        running = Program(process, output)
        try:
            yield running
        finally:
            running.kill()
