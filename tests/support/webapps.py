"""The same handler in each web framework, the servers that run it, and an HTTP client for them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO

from aibind_postgres import (
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    Generation,
    PostgresStreamStore,
    Resource,
    StreamEvent,
    StreamHandler,
    WebRequest,
)
from aibind_postgres.sse import EventParser, ServerSentEvent

JSON = {"Content-Type": "application/json"}

OPTIONS: dict[str, Any] = {"heartbeat": 0.2, "max_body": 10_000}
if seconds := os.environ.get("SEND_TIMEOUT"):
    OPTIONS["send_timeout"] = float(seconds)
    logging.basicConfig(level=logging.INFO)  # logs the clients that do not read


Refuse = Callable[[], Any]  # raises an exception of the framework
MakeHandler = Callable[[Refuse], Any]


def authorize(refuse: Refuse, request: WebRequest, resource: Resource) -> bool:
    """Refuse requests with the header `User: stranger`, or `Not-In: PID` in the process with that PID.

    With `User: nobody`, refuse as the framework does.
    """
    if request.headers.get("user") == "nobody":
        refuse()
    return request.headers.get("user") != "stranger" and request.headers.get("not-in") != f"{os.getpid()}"


def script(generation: Generation) -> list[tuple[float, str | StreamEvent | Exception]]:
    """Return the items of the answer to a prompt, each with the pause before it in seconds."""
    command, _, rest = generation.prompt.partition(" ")
    usage = StreamEvent("usage", '{"outputTokens": 3}')
    if generation.kind == "structured":
        partials = [StreamEvent("partial", text) for text in ("{}", '{"colour": "b"}', '{"colour": "blue"}')]
        return [(0.01, item) for item in (*partials, StreamEvent("data", '{"colour": "blue"}'), usage)]
    if generation.kind == "chat":
        call = StreamEvent("tool_call", '{"name": "look", "args": {"where": "up"}}')
        return [(0.01, item) for item in ("The sky ", call, call, "is ", "blue", usage)]
    if command == "slowly":
        return [(0.3, word) for word in rest.split()]
    if command == "silence":
        return [(0, "one"), (60, "never")]
    if command == "fail":
        return [(0, "half "), (0, "way"), (0.1, RuntimeError("password=secret"))]
    if command == "fail-first":
        return [(0, usage), (0, RuntimeError("password=secret"))]
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


class BlockingSource:
    """A source that yields its PID, blocks until it is closed, and then records that in the stream `log_id`.

    It is not a generator, since a generator that runs in one thread cannot be closed by another.
    """

    def __init__(self, store: PostgresStreamStore, log_id: str) -> None:
        self._store = store
        self._log_id = log_id
        self._yielded = False
        self._closed = threading.Event()

    def __iter__(self) -> BlockingSource:
        return self

    def __next__(self) -> str:
        if not self._yielded:
            self._yielded = True
            return f"{os.getpid()}"
        self._closed.wait()
        self._store.append(self._log_id, f"closed in {os.getpid()}")
        self._store.complete(self._log_id)
        raise StopIteration

    def close(self) -> None:
        self._closed.set()


def counting_source(store: PostgresStreamStore, log_id: str) -> Iterator[str]:
    """Yield the PID, and then numbers until it is closed. Record that in the stream `log_id`."""
    try:
        yield f"{os.getpid()} "
        for number in range(1000):
            time.sleep(0.02)
            yield f"{number} "
    finally:
        store.append(log_id, f"closed in {os.getpid()}")
        store.complete(log_id)


async def async_counting_source(store: AsyncPostgresStreamStore, log_id: str) -> AsyncIterator[str]:
    try:
        yield f"{os.getpid()} "
        for number in range(1000):
            await asyncio.sleep(0.02)
            yield f"{number} "
    finally:
        await store.append(log_id, f"closed in {os.getpid()}")
        await store.complete(log_id)


def refusing_source(refuse: Refuse) -> Iterator[str]:
    refuse()
    yield "never"


async def async_refusing_source(refuse: Refuse) -> AsyncIterator[str]:
    refuse()
    yield "never"


async def async_blocking_source(store: AsyncPostgresStreamStore, log_id: str) -> AsyncIterator[str]:
    try:
        yield f"{os.getpid()}"
        await asyncio.Event().wait()
    finally:
        await store.append(log_id, f"closed in {os.getpid()}")
        await store.complete(log_id)


def handler(refuse: Refuse) -> StreamHandler:
    store = PostgresStreamStore(os.environ["DATABASE_URL"])

    def generate(generation: Generation) -> Any:
        command, _, rest = generation.prompt.partition(" ")
        if command == "refuse":
            refuse()
        if command == "refuse-later":
            return refusing_source(refuse)
        if command == "count":
            return counting_source(store, rest)
        return BlockingSource(store, rest) if command == "block" else answer(generation)

    return StreamHandler(generate, store=store, authorize=partial(authorize, refuse), **OPTIONS)


def async_handler(refuse: Refuse) -> AsyncStreamHandler:
    store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"])

    def generate(generation: Generation) -> Any:
        command, _, rest = generation.prompt.partition(" ")
        if command == "refuse":
            refuse()
        if command == "refuse-later":
            return async_refusing_source(refuse)
        if command == "count":
            return async_counting_source(store, rest)
        return async_blocking_source(store, rest) if command == "block" else async_answer(generation)

    return AsyncStreamHandler(generate, store=store, authorize=partial(authorize, refuse), **OPTIONS)


def flask(make_handler: MakeHandler = handler) -> Any:
    from flask import Flask, abort

    from aibind_postgres.contrib.flask import blueprint

    app = Flask(__name__)
    app.register_blueprint(blueprint(make_handler(partial(abort, REFUSED["flask"]))))
    return app


def refuse_in_starlette() -> None:
    from starlette.exceptions import HTTPException

    raise HTTPException(REFUSED["starlette"])


def starlette(make_handler: MakeHandler = async_handler) -> Any:
    from starlette.applications import Starlette

    from aibind_postgres.contrib.starlette import routes

    return Starlette(routes=routes(make_handler(refuse_in_starlette)))


def refuse_in_fastapi() -> None:
    from fastapi import HTTPException

    raise HTTPException(REFUSED["fastapi"])


def fastapi(make_handler: MakeHandler = async_handler) -> Any:
    from fastapi import FastAPI

    from aibind_postgres.contrib.fastapi import router

    app = FastAPI()
    app.include_router(router(make_handler(refuse_in_fastapi)))
    return app


def _configure_django(any_handler: StreamHandler | AsyncStreamHandler) -> None:
    import django
    from django.conf import settings

    from aibind_postgres.contrib.django import urlpatterns

    settings.configure(
        MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],  # Django's default
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="-",
        LOGGING_CONFIG=None,  # sends errors to the server's log
    )
    settings.ROOT_URLCONF = tuple(urlpatterns(any_handler))  # Django accepts patterns in place of a module name
    django.setup()


def refuse_in_django() -> None:
    from django.http import Http404

    raise Http404


def django_wsgi(make_handler: MakeHandler = handler) -> Any:
    from django.core.wsgi import get_wsgi_application

    _configure_django(make_handler(refuse_in_django))
    return get_wsgi_application()


def django_asgi(make_handler: MakeHandler = async_handler) -> Any:
    from django.core.asgi import get_asgi_application

    _configure_django(make_handler(refuse_in_django))
    return get_asgi_application()


# The status with which each application refuses.
REFUSED = {"flask": 401, "django, wsgi": 404, "django, asgi": 404, "starlette": 402, "fastapi": 402}

# With httptools, which some environments have, uvicorn answers requests of HTTP/1.0 in chunks.
UVICORN = "uvicorn --workers=2 --host=127.0.0.1 --port={port} --http=h11 --factory"
SERVERS = {
    "flask": "gunicorn --workers=2 --threads=20 --bind=127.0.0.1:{port} support.{module}:flask()",
    "django, wsgi": "gunicorn --workers=2 --threads=20 --bind=127.0.0.1:{port} support.{module}:django_wsgi()",
    "django, asgi": f"{UVICORN} support.{{module}}:django_asgi",
    "starlette": f"{UVICORN} support.{{module}}:starlette",
    "fastapi": f"{UVICORN} support.{{module}}:fastapi",
}


@contextmanager
def running(framework: str, dsn: str, module: str = "webapps", **variables: str) -> Iterator[Client]:
    """Run the application of a framework on its server, with two worker processes and more environment variables.

    The application is that of this module, or of another one of `tests/support/`.
    """
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *SERVERS[framework].format(port=port, module=module).split()]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": os.pathsep.join([tests, *sys.path]), **variables}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        try:
            client = Client(framework, port, process, log)
            client.wait_until_ready()
            yield client
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:  # a server may wait for busy threads
                os.killpg(process.pid, signal.SIGKILL)  # the server and its workers
                process.wait()


class Client:
    """An HTTP client of one server, with access to the server's log and processes."""

    def __init__(self, framework: str, port: int, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        self.framework = framework
        self.port = port
        self._process = process
        self._log = log

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.post("/complete", {"input": "x"}).close()
            except OSError:
                assert self._process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not respond"
                time.sleep(0.05)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        """Send a request on a new connection. Closing the response closes the connection."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Connection": "close", **({} if body is None else JSON), **(headers or {})}
        with suppress(BrokenPipeError):  # the server may respond before it has received the whole body
            connection.request(method, f"/__aibind__{path}", body, headers)
        return connection.getresponse()

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> HTTPResponse:
        return self.request("POST", path, json.dumps(body).encode(), headers)

    def resume(
        self, id: str, after: int | str, headers: dict[str, str] | None = None, path: str = "/stream"
    ) -> HTTPResponse:
        return self.request("GET", f"{path}/resume?id={id}&after={after}", headers=headers)

    @contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """Open a raw connection, to send malformed or unfinished requests."""
        with closing(socket.create_connection(("127.0.0.1", self.port), 30)) as connection:
            yield connection

    def processes(self) -> list[Path]:
        """Return the /proc folders of the server and all its descendants."""
        pids = [self._process.pid]
        for pid in pids:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [Path(f"/proc/{pid}") for pid in pids]

    def read_log(self) -> str:
        """Return the server's log so far."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode()


def events(response: HTTPResponse) -> Iterator[ServerSentEvent]:
    """Yield events as they arrive, and close the response at its end."""
    parser = EventParser()
    with closing(response):
        while received := response.read1(65536):
            yield from parser.feed(received)
