"""Runs the command `aibind-postgres` on a pseudoterminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .command_line import COMMAND, environment

TIMEOUT = 60  # seconds without the expected output after which a command counts as hanging


class Terminal:
    """A command whose standard streams are a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor
        self.output = ""
        self.returncode: int | None = None

    def send(self, text: str) -> None:
        """Type a text."""
        os.write(self._descriptor, text.encode())

    def read_until(self, text: str) -> None:
        """Read the output until it contains a text."""
        while text not in self.output:
            assert self._read(), f"the command has ended: {self.output!r}"

    def read_rest(self) -> str:
        """Read the output until the command ends. Return all of it."""
        while self._read():
            pass
        self.returncode = self._process.wait(TIMEOUT)
        return self.output

    def _read(self) -> bool:
        deadline = time.monotonic() + TIMEOUT
        while not select.select([self._descriptor], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, f"the command hangs after {self.output!r}"
        data = b""
        with suppress(OSError):  # EIO: the command has closed the terminal
            data = os.read(self._descriptor, 65_536)
        self.output += data.decode()
        return bool(data)


@contextmanager
def terminal(*arguments: str, dsn: str | None = None, **variables: str) -> Iterator[Terminal]:
    """Run a command on a terminal. Leaving the block kills it."""
    outer, inner = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", **variables}
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environment(dsn, **variables),
        start_new_session=True,
        preexec_fn=_control_terminal,
    )
    os.close(inner)
    try:
        yield Terminal(process, outer)
    finally:
        process.kill()
        process.wait()
        os.close(outer)


def _control_terminal() -> None:
    """Make the terminal that of the new session, so that Ctrl-C sends SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def run_on_terminal(*arguments: str, dsn: str | None = None, **variables: str) -> tuple[int | None, str]:
    """Run a command on a terminal. Return its exit code and its output."""
    with terminal(*arguments, dsn=dsn, **variables) as running:
        output = running.read_rest()
    return running.returncode, output
