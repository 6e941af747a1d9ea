"""Functions that run in processes of their own, to be killed there, and what they say until then."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BOUND = 90  # seconds after which a process that says nothing, or does not end, is taken for one that hangs
BATCH = 7  # chunks that a producer sends at once

# `support` is found where it was found here. An error of the package is the last thing that a program says.
MAIN = """
import asyncio, inspect, runpy, sys
_, tests, file, function, *arguments = sys.argv
sys.path.insert(0, tests)
from aibind_postgres import AibindError
from support.programs import say
try:
    result = runpy.run_path(file)[function](*arguments)
    if inspect.iscoroutine(result):
        asyncio.run(result)
except AibindError as error:
    say(type(error).__name__)
"""


def say(what: object) -> None:
    """Tell the test, so that it is told also if this process is killed right now."""
    print(json.dumps(what), flush=True)


def text_of(name: str, seq: int) -> str:
    """Return what a producer writes as its chunk of this number."""
    return f"{name} {seq} " * 20


class Program:
    """A process that runs one function."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    def said(self) -> list[Any]:
        return [json.loads(line) for line in self._output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, count: int) -> None:
        """Wait until it has said so many things."""
        deadline = time.monotonic() + BOUND
        while len(said := self.said()) < count:
            assert self.process.poll() is None, f"the program has ended; its last words are {said[-1:]}"
            assert time.monotonic() < deadline, f"the program hangs; its last words are {said[-1:]}"
            time.sleep(0.01)

    def end(self) -> list[Any]:
        """Wait for its end and return what it has said."""
        self.process.wait(BOUND)
        return self.said()

    def kill(self) -> list[Any]:
        self.process.kill()
        return self.end()


@contextmanager
def program(folder: Path, file: Path, function: str, *arguments: str) -> Iterator[Program]:
    """Run a function of a file in a process of its own, killed at the latest when the block is left."""
    tests = str(Path(__file__).parent.parent)
    output = folder / f"{time.monotonic_ns()}.txt"
    command = [sys.executable, "-c", MAIN, tests, str(file), function, *arguments]
    with output.open("wb") as stdout, subprocess.Popen(command, stdout=stdout) as process:
        running = Program(process, output)
        try:
            yield running
        finally:
            running.kill()
