"""One handler in each framework, as applications for real servers, and a client that reads as a browser does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO

from aibind_postgres import (
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    Generation,
    PostgresStreamStore,
    StreamEvent,
    StreamHandler,
    WebRequest,
)
from aibind_postgres.sse import EventParser, ServerSentEvent

OPTIONS: dict[str, Any] = {"heartbeat": 0.2, "max_body": 10_000}


def allowed(request: WebRequest, id: str) -> bool:
    """Refuse a stranger, and who wants the answer of another process than one."""
    return request.headers.get("user") != "stranger" and request.headers.get("not-in") != f"{os.getpid()}"


def script(generation: Generation) -> list[tuple[float, str | StreamEvent | Exception]]:
    """Return what a prompt makes the model say, and the seconds before each."""
    kind, _, rest = generation.prompt.partition(" ")
    usage = StreamEvent("usage", '{"outputTokens": 3}')
    if generation.kind == "structured":
        partials = [StreamEvent("partial", text) for text in ("{}", '{"colour": "b"}', '{"colour": "blue"}')]
        return [(0.01, item) for item in (*partials, StreamEvent("data", '{"colour": "blue"}'), usage)]
    if generation.kind == "chat":
        call = StreamEvent("tool_call", '{"name": "look", "args": {"where": "up"}}')
        return [(0.01, item) for item in ("The sky ", call, call, "is ", "blue", usage)]
    if kind == "slowly":
        return [(0.3, word) for word in rest.split()]
    if kind == "silence":
        return [(0, "one"), (60, "never")]
    if kind == "fail":
        return [(0, "half "), (0, "way"), (0, RuntimeError("password=secret"))]
    return [(0, f"{word} ") for word in generation.prompt.split()] + [(0, usage)]


def answer(generation: Generation) -> Iterator[str | StreamEvent]:
    for pause, item in script(generation):
        time.sleep(pause)
        if isinstance(item, Exception):
            raise item
        yield item


async def async_answer(generation: Generation) -> AsyncIterator[str | StreamEvent]:
    for pause, item in script(generation):
        await asyncio.sleep(pause)
        if isinstance(item, Exception):
            raise item
        yield item


class Held:
    """A source that tells its process and then waits until it is closed; that it was, it writes into a stream.

    Not a generator: one that waits in a thread cannot be closed from another.
    """

    def __init__(self, store: PostgresStreamStore, trace: str) -> None:
        self._store = store
        self._trace = trace
        self._told = False
        self._closed = threading.Event()

    def __iter__(self) -> Held:
        return self

    def __next__(self) -> str:
        if not self._told:
            self._told = True
            return f"{os.getpid()}"
        self._closed.wait()
        self._store.append(self._trace, f"closed in {os.getpid()}")
        self._store.complete(self._trace)
        raise StopIteration

    def close(self) -> None:
        self._closed.set()


async def async_held(store: AsyncPostgresStreamStore, trace: str) -> AsyncIterator[str]:
    try:
        yield f"{os.getpid()}"
        await asyncio.Event().wait()
    finally:
        await store.append(trace, f"closed in {os.getpid()}")
        await store.complete(trace)


def handler() -> StreamHandler:
    store = PostgresStreamStore(os.environ["DATABASE_URL"])

    def generate(generation: Generation) -> Any:
        kind, _, rest = generation.prompt.partition(" ")
        return Held(store, rest) if kind == "hold" else answer(generation)

    return StreamHandler(generate, store=store, authorize=allowed, **OPTIONS)


def async_handler() -> AsyncStreamHandler:
    store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"])

    def generate(generation: Generation) -> Any:
        kind, _, rest = generation.prompt.partition(" ")
        return async_held(store, rest) if kind == "hold" else async_answer(generation)

    return AsyncStreamHandler(generate, store=store, authorize=allowed, **OPTIONS)


def flask() -> Any:
    from flask import Flask

    from aibind_postgres.contrib.flask import blueprint

    app = Flask(__name__)
    app.register_blueprint(blueprint(handler()))
    return app


def starlette() -> Any:
    from starlette.applications import Starlette

    from aibind_postgres.contrib.starlette import routes

    return Starlette(routes=routes(async_handler()))


def fastapi() -> Any:
    from fastapi import FastAPI

    from aibind_postgres.contrib.starlette import routes

    app = FastAPI()
    app.router.routes.extend(routes(async_handler()))  # as README has it
    return app


def _configure_django(either: StreamHandler | AsyncStreamHandler) -> None:
    import django
    from django.conf import settings

    from aibind_postgres.contrib.django import urlpatterns

    settings.configure(
        MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],  # as every Django project has it
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="-",
        LOGGING_CONFIG=None,  # errors go to the server's log, as elsewhere
    )
    settings.ROOT_URLCONF = tuple(urlpatterns(either))  # in place of the name of a module, which has settings before
    django.setup()


def django_wsgi() -> Any:
    from django.core.wsgi import get_wsgi_application

    _configure_django(handler())
    return get_wsgi_application()


def django_asgi() -> Any:
    from django.core.asgi import get_asgi_application

    _configure_django(async_handler())
    return get_asgi_application()


SERVERS = {
    "flask": "gunicorn --workers=2 --threads=20 --bind=127.0.0.1:{port} support.webapps:flask()",
    "django, wsgi": "gunicorn --workers=2 --threads=20 --bind=127.0.0.1:{port} support.webapps:django_wsgi()",
    "django, asgi": "uvicorn --workers=2 --host=127.0.0.1 --port={port} --factory support.webapps:django_asgi",
    "starlette": "uvicorn --workers=2 --host=127.0.0.1 --port={port} --factory support.webapps:starlette",
    "fastapi": "uvicorn --workers=2 --host=127.0.0.1 --port={port} --factory support.webapps:fastapi",
}


@contextmanager
def running(framework: str, dsn: str) -> Iterator[Client]:
    """Run an application on its server, in two worker processes."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *SERVERS[framework].format(port=port).split()]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        try:
            client = Client(framework, port, process, log)
            client.wait()
            yield client
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:  # a server may wait for threads that are busy
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
                process.wait()


class Client:
    """What a browser does, and what a test sees of the server besides."""

    def __init__(self, framework: str, port: int, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        self.framework = framework
        self.port = port
        self._process = process
        self._log = log

    def wait(self) -> None:
        give_up_at = time.monotonic() + 60
        while True:
            try:
                return self.post("/complete", {"input": "x"}).close()
            except OSError:
                assert self._process.poll() is None, "the server has ended"
                assert time.monotonic() < give_up_at, "the server does not answer"
                time.sleep(0.05)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        """Send a request, on a connection of its own, which is closed with the response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, f"/__aibind__{path}", body, {"Connection": "close", **(headers or {})})
        return connection.getresponse()

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> HTTPResponse:
        return self.request("POST", path, json.dumps(body).encode(), headers)

    def resume(
        self, id: str, after: int | str, headers: dict[str, str] | None = None, path: str = "/stream"
    ) -> HTTPResponse:
        return self.request("GET", f"{path}/resume?id={id}&after={after}", headers=headers)

    @contextmanager
    def line(self) -> Iterator[socket.socket]:
        """Connect, to send what no client library would."""
        with closing(socket.create_connection(("127.0.0.1", self.port), 30)) as line:
            yield line

    def processes(self) -> list[Path]:
        """Return the folders in /proc of the server's processes."""
        found = [self._process.pid]
        for pid in found:
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [Path(f"/proc/{pid}") for pid in found]

    def logged(self) -> str:
        """Return what the server has written to its log."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode()


def events(response: HTTPResponse) -> Iterator[ServerSentEvent]:
    """Read events as they come."""
    parser = EventParser()
    with closing(response):
        while received := response.read1(65536):
            yield from parser.feed(received)
