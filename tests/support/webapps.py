"""One handler in each framework, as applications for real servers, and a client that reads as a browser does."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

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
    return request.headers.get("user") != "stranger"


def script(generation: Generation) -> list[tuple[float, str | StreamEvent]]:
    """Return what a prompt makes the model say, and the seconds before each."""
    kind, _, rest = generation.prompt.partition(" ")
    if kind == "slowly":
        return [(0.3, word) for word in rest.split()]
    if kind == "silence":
        return [(0, "one"), (60, "never")]
    return [(0, f"{word} ") for word in generation.prompt.split()] + [(0, StreamEvent("usage", '{"outputTokens": 3}'))]


def answer(generation: Generation) -> Iterator[str | StreamEvent]:
    for pause, item in script(generation):
        time.sleep(pause)
        yield item


async def async_answer(generation: Generation) -> AsyncIterator[str | StreamEvent]:
    for pause, item in script(generation):
        await asyncio.sleep(pause)
        yield item


def flask() -> Any:
    from flask import Flask

    from aibind_postgres.contrib.flask import blueprint

    store = PostgresStreamStore(os.environ["DATABASE_URL"])
    app = Flask(__name__)
    app.register_blueprint(blueprint(StreamHandler(answer, store=store, authorize=allowed, **OPTIONS)))
    return app


def starlette() -> Any:
    from starlette.applications import Starlette

    from aibind_postgres.contrib.starlette import routes

    store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"])
    handler = AsyncStreamHandler(async_answer, store=store, authorize=allowed, **OPTIONS)
    return Starlette(routes=routes(handler))


def _configure_django(handler: StreamHandler | AsyncStreamHandler) -> None:
    import django
    from django.conf import settings

    from aibind_postgres.contrib.django import urlpatterns

    # In place of the name of a module: the patterns themselves.
    settings.configure(
        ROOT_URLCONF=tuple(urlpatterns(handler)),
        MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],  # as every Django project has it
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="-",
    )
    django.setup()


def django_wsgi() -> Any:
    from django.core.wsgi import get_wsgi_application

    store = PostgresStreamStore(os.environ["DATABASE_URL"])
    _configure_django(StreamHandler(answer, store=store, authorize=allowed, **OPTIONS))
    return get_wsgi_application()


def django_asgi() -> Any:
    from django.core.asgi import get_asgi_application

    store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"])
    _configure_django(AsyncStreamHandler(async_answer, store=store, authorize=allowed, **OPTIONS))
    return get_asgi_application()


SERVERS = {
    "flask": "gunicorn --workers=2 --threads=20 --bind=127.0.0.1:{port} support.webapps:flask()",
    "django, wsgi": "gunicorn --workers=2 --threads=20 --bind=127.0.0.1:{port} support.webapps:django_wsgi()",
    "django, asgi": "uvicorn --workers=2 --host=127.0.0.1 --port={port} --factory support.webapps:django_asgi",
    "starlette": "uvicorn --workers=2 --host=127.0.0.1 --port={port} --factory support.webapps:starlette",
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
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = Client(port)
        client.wait_for(process)
        yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # a server may wait for threads that are busy
            process.kill()
            process.wait()


class Client:
    def __init__(self, port: int) -> None:
        self._port = port

    def wait_for(self, process: subprocess.Popen[bytes]) -> None:
        give_up_at = time.monotonic() + 60
        while True:
            try:
                return self.post("/complete", {"input": "x"}).close()
            except OSError:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < give_up_at, "the server does not answer"
                time.sleep(0.05)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> HTTPResponse:
        """Send a request, on a connection of its own, which is closed with the response."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request(method, f"/__aibind__{path}", body, {"Connection": "close", **(headers or {})})
        return connection.getresponse()

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> HTTPResponse:
        return self.request("POST", path, json.dumps(body).encode(), headers)

    def resume(self, id: str, after: int, headers: dict[str, str] | None = None) -> HTTPResponse:
        return self.request("GET", f"/stream/resume?id={id}&after={after}", headers=headers)


def events(response: HTTPResponse) -> Iterator[ServerSentEvent]:
    """Read events as they come."""
    parser = EventParser()
    with closing(response):
        while received := response.read1(65536):
            yield from parser.feed(received)
