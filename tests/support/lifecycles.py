"""Forked children, and Python programs that run until they exit."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

TIMEOUT = 30  # seconds after which a process counts as hanging


def do_nothing() -> None: ...


def in_a_child(call: Callable[[], object], meanwhile: Callable[[], object] = do_nothing) -> str:
    """Run `call` in a forked child and return the `str` of its result. Raise `AssertionError` if it raises.

    The parent runs `meanwhile` at the same time. The child then exits at once, like a killed worker, without closing
    the resources that it inherited.
    """
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(2 * TIMEOUT)  # ends the child if the parent has died
            text = f"+{call()}"
        except BaseException:
            text = f"-{traceback.format_exc()}"
        os.write(sender, text.encode()[:60_000])
        os._exit(0)
    os.close(sender)
    try:
        meanwhile()
        received = b""
        while select.select([receiver], [], [], TIMEOUT)[0] and (part := os.read(receiver, 65_536)):
            received += part
    finally:
        os.close(receiver)
        os.kill(pid, signal.SIGKILL)  # the PID cannot have been reused before waitpid
        os.waitpid(pid, 0)
    if not received:
        raise TimeoutError("the child hangs")
    if received[:1] == b"-":
        raise AssertionError(f"in the child: {received[1:].decode()}")
    return received[1:].decode()


def run_to_the_end(program: str, *arguments: str) -> tuple[int, str, str]:
    """Run a Python program and return its exit code, stdout and stderr."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return done.returncode, done.stdout, done.stderr
