"""The applications in `examples/` on their servers, and browsers that keep cookies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, Request, build_opener

from aibind_postgres.sse import EventParser, ServerSentEvent

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def environment_of(dsn: str, **variables: str) -> dict[str, str]:
    """Return the environment in which an example finds the package and the database."""
    return {**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}


@contextmanager
def serving(command: str, dsn: str, **variables: str) -> Iterator[str]:
    """Run a server and yield its address. Its command contains `{port}`. Leaving the block ends the server."""
    with serving_process(command, dsn, **variables) as (url, _):
        yield url


@contextmanager
def serving_process(command: str, dsn: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server as `serving` does. Yield its address and its process, which may be killed."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.format(port=port).split()],
            cwd=EXAMPLES.parent,
            env=environment_of(dsn, **variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_until_ready(port, process, log.fileno())
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the server and its workers
                process.wait()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, os.pread(log, 100_000, 0).decode()
        assert time.monotonic() < deadline, f"the server does not respond: {os.pread(log, 100_000, 0).decode()}"
        try:
            return socket.create_connection(("127.0.0.1", port), 30).close()
        except OSError:
            time.sleep(0.05)


class Browser:
    """An HTTP client of one user. It keeps cookies, and sends `headers` with each request."""

    def __init__(self, url: str, **headers: str) -> None:
        self._url = url
        self._opener = build_opener(HTTPCookieProcessor())
        self.headers = headers

    def open(self, method: str, path: str, body: object = None, **headers: str) -> HTTPResponse:
        """Send a request, with a body as JSON unless it is bytes. Raise `HTTPError` for a status from 400."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        request = Request(self._url + path, body, {**self.headers, **headers}, method=method)
        response: HTTPResponse = self._opener.open(request, timeout=30)
        return response

    def status(self, method: str, path: str, body: object = None, **headers: str) -> int:
        """Send a request and return the status."""
        try:
            with self.open(method, path, body, **headers) as response:
                return response.status
        except HTTPError as error:
            with error:
                return error.code

    def json(self, method: str, path: str, body: object = None) -> Any:
        with self.open(method, path, body) as response:
            return json.load(response)

    def conversations(self) -> list[dict[str, Any]]:
        conversations: list[dict[str, Any]] = self.json("GET", "/__aibind__/conversations")["conversations"]
        return conversations

    def ask(self, prompt: str, session: str) -> HTTPResponse:
        """Start an answer in a conversation. Its response has the header `X-Stream-Id`."""
        return self.open("POST", "/__aibind__/stream", {"prompt": prompt, "sessionId": session})

    def resume(self, id: str) -> HTTPResponse:
        return self.open("GET", f"/__aibind__/stream/resume?id={id}")


def wait_for_text(response: HTTPResponse) -> None:
    """Read an answer until its first text."""
    parser = EventParser()
    while received := response.read1(65536):
        if any(event.event == "message" for event in parser.feed(received)):
            return
    raise AssertionError("the answer has ended without a text")


def events_of(response: HTTPResponse) -> list[ServerSentEvent]:
    """Return all events of a response, and close it."""
    with response:
        return list(EventParser().feed(response.read()))


def text_of(response: HTTPResponse) -> str:
    """Return the text of an answer that ends as `done`, and close the response."""
    events = events_of(response)
    assert [event.event for event in events if event.event != "message"][-1:] == ["done"], events
    return "".join(event.data for event in events if event.event == "message")
