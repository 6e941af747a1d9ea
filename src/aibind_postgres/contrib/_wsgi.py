"""The socket of a WSGI request, on servers that expose it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

SOCKETS = ("gunicorn.socket", "werkzeug.socket")  # the keys of the environment


def disconnect_of(environ: Mapping[str, Any]) -> Callable[[], None] | None:
    """Return a function that closes the connection of a request, or None if the server does not expose it.

    Nothing else interrupts a thread that sends to a client that does not read.
    """
    for name in SOCKETS:
        if name in environ:
            return partial(_shut_down, environ[name])
    return None


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # already closed
        connection.shutdown(socket.SHUT_RDWR)
