"""Forks, and programs that end as they like."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

LONGEST = 30  # seconds after which a process hangs


def nothing() -> None: ...


def in_a_child(call: Callable[[], object], meanwhile: Callable[[], object] = nothing) -> str:
    """Fork, have the child call, and return the text of what that returns; raise what has gone wrong there.

    The parent calls `meanwhile` at the same time. The child ends at once, as a worker that is killed does, without a
    word to what it has inherited.
    """
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(2 * LONGEST)  # if the parent is gone
            text = f"+{call()}"
        except BaseException:
            text = f"-{traceback.format_exc()}"
        os.write(sender, text.encode()[:60_000])
        os._exit(0)
    os.close(sender)
    try:
        meanwhile()
        said = b""
        while select.select([receiver], [], [], LONGEST)[0] and (part := os.read(receiver, 65_536)):
            said += part
    finally:
        os.close(receiver)
        os.kill(pid, signal.SIGKILL)  # not yet waited for, so it is still that process
        os.waitpid(pid, 0)
    if not said:
        raise TimeoutError("the child hangs")
    if said[:1] == b"-":
        raise AssertionError(f"in the child: {said[1:].decode()}")
    return said[1:].decode()


def run_to_the_end(program: str, *arguments: str) -> tuple[int, str, str]:
    """Run a Python program and return its exit code, and what it wrote to stdout and to stderr."""
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    return ended.returncode, ended.stdout, ended.stderr
