"""The processes of a chat: a web server with two worker processes, and a process that produces answers."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from support.chat_users import HANG, PRODUCING_PERIOD, Browser

FAULTS = Path(__file__).parents[1] / "faults"

SERVERS = {
    "uvicorn": "uvicorn --workers=2 --host=127.0.0.1 --port={port} --log-level=warning --factory "
    "support.chat_apps:starlette",
    "gunicorn": "gunicorn --workers=2 --threads=60 --bind=127.0.0.1:{port} --log-level=warning "
    "support.chat_apps:flask()",
}
FOLDERS = {"uvicorn": FAULTS / "_async", "gunicorn": FAULTS / "_sync"}
WORKER = "import asyncio, chats, inspect; work = chats.work(); inspect.iscoroutine(work) and asyncio.run(work)"


class Processes:
    """The processes of one chat. Leaving the block kills them.

    Args:
        server: A key of `SERVERS`.
        dsn: The database.
        folder: An empty folder for the records of the processes.
    """

    def __init__(self, server: str, dsn: str, folder: Path) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._commands = {
            "web": [sys.executable, "-m", *SERVERS[server].format(port=self.port).split()],
            "worker": [sys.executable, "-c", WORKER],
        }
        path = os.pathsep.join([str(FOLDERS[server]), str(FAULTS.parent), *sys.path])
        self._environment = {**os.environ, "DATABASE_URL": dsn, "RECORDS": str(folder), "PYTHONPATH": path}
        self._web_pids = folder / "web"
        self._web_pids.mkdir()
        (folder / "jobs").mkdir()
        self._log = (folder / "log").open("wb")
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        for kind in self._commands:
            self._start(kind)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running.values():
            self._kill_all(process)
        self._log.close()

    def kind_of(self, pid: int) -> str:
        return "web" if (self._web_pids / f"{pid}").exists() else "worker"

    def kill(self, pid: int, *, whole_server: bool) -> None:
        """Kill the process that produces answers, one of the web processes, or the server with all of them."""
        kind = self.kind_of(pid)
        if kind == "worker" or whole_server:
            self._kill_all(self._running[kind])
            self._start(kind)
        else:  # the server replaces it
            os.kill(pid, signal.SIGKILL)

    def _start(self, kind: str) -> None:
        self._running[kind] = subprocess.Popen(
            self._commands[kind],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _kill_all(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Killer:
    """Kills processes at random while they produce answers, so that each kill interrupts some."""

    def __init__(self, processes: Processes, browsers: Sequence[Browser], seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self._processes = processes
        self._browsers = browsers
        self._random = random.Random(seed)
        self._killed: set[int] = set()

    def run(self, times: int) -> None:
        """Kill web processes and the worker process, each `times` times, in random order."""
        kinds = ["web", "worker"] * times
        self._random.shuffle(kinds)
        for kind in kinds:
            time.sleep(self._random.uniform(0.5, 3))
            pid = self._wait_for(lambda kind=kind: self._busy(kind))
            self._killed.add(pid)
            whole_server = self._random.random() < 0.3
            self._processes.kill(pid, whole_server=whole_server)
            self.kills["whole server" if kind == "web" and whole_server else kind] += 1

    def wait_for_ends(self) -> None:
        """Wait until all browsers have ended."""
        for browser in self._browsers:
            browser.join(2 * HANG)
        self.check()
        assert not any(browser.is_alive() for browser in self._browsers), "some readers have not received the end"

    def check(self) -> None:
        """Raise the first error of a browser."""
        for browser in self._browsers:
            if browser.error is not None:
                raise browser.error

    def _wait_for(self, find: Callable[[], int | None]) -> int:
        deadline = time.monotonic() + HANG
        while (found := find()) is None:
            self.check()
            assert time.monotonic() < deadline, f"no answers are produced after {self.kills}"
            time.sleep(0.02)
        return found

    def _busy(self, kind: str) -> int | None:
        """Return the PID of a process of a kind that is producing at least two answers, or None."""
        since = time.monotonic() - PRODUCING_PERIOD
        answers = Counter(pid for pid, at in (browser.last_token for browser in self._browsers) if at > since)
        busy = {pid for pid, count in answers.items() if count >= 2 and Path(f"/proc/{pid}").exists()}
        pids = sorted(pid for pid in busy - self._killed if self._processes.kind_of(pid) == kind)
        return self._random.choice(pids) if pids else None
