"""A server with the HTTP interface of OpenAI that sends given events, for tests of the `openai` client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


class ModelServer:
    """Answers each request with the same events.

    Attributes:
        url: The `base_url` of a client.
        events: The JSON objects to send.
        then: After them, end the response, lose the connection, or repeat the last event without end.
        disconnected: Set when a client has left during `repeat`.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.then: Literal["end", "cut", "repeat"] = "end"
        self.disconnected = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.send_header("Connection", "close")
                self.end_headers()
                server._send(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def _send(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        for event in self.events:
            send(handler, event_of(event))
        try:
            while self.then == "repeat":
                send(handler, event_of(self.events[-1]))
                time.sleep(0.01)
        except OSError:
            self.disconnected.set()
            return
        if self.then == "end":
            send(handler, b"data: [DONE]\n\n")
            handler.wfile.write(b"0\r\n\r\n")


def event_of(event: dict[str, Any]) -> bytes:
    """Return an event as OpenAI encodes it: those of the Responses API have a name."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n".encode()


def send(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
    handler.wfile.flush()


@contextmanager
def running() -> Iterator[ModelServer]:
    """Run a server on a free port."""
    server = ModelServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.then = "end"
        server.http.shutdown()
        server.http.server_close()
        thread.join()
