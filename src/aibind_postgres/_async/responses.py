"""The responses of the handler."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import InvalidDataError, StreamNotFoundError, WebError


class AsyncWebResponse(NamedTuple):
    """A response for any framework.

    Attributes:
        status: The HTTP status code.
        headers: The response headers.
        body: The complete body, or an iterator of bytes to send as they arrive: encoded events, or parts of a text. If
            the iterator raises, the body is incomplete: close the connection, so that the client notices.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | AsyncIterator[bytes]

    def __repr__(self) -> str:
        body = f"{len(self.body)} bytes" if isinstance(self.body, bytes) else "streamed"
        return f"<{type(self).__name__} {self.status}, {body}>"


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> AsyncWebResponse:
    all_headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **(headers or {})}
    return AsyncWebResponse(status, all_headers, json.dumps(content).encode())


def stream_not_found() -> WebError:
    return WebError(404, "stream not found: it was never created, was deleted, or has expired")


def conversation_not_found() -> WebError:
    return WebError(404, "conversation not found: it was never created, was deleted, or has expired")


@contextmanager
def map_client_errors() -> Iterator[None]:
    """Map unknown or invalid ids to 404 or 400. Use it for store calls only: errors of the application propagate."""
    try:
        yield
    except StreamNotFoundError:
        raise stream_not_found() from None
    except InvalidDataError as error:
        raise WebError(400, str(error)) from None
