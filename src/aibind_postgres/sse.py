"""Encoding and parsing of Server-Sent Events. Pure.

Follows the HTML standard (WHATWG), section 9.2, "Server-sent events".
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from .errors import InvalidDataError

MESSAGE = "message"  # the default event name

_LINE_END = re.compile(r"\r\n|\n|\r")
_UNSAFE = {"event": re.compile(r"[\r\n]"), "id": re.compile(r"[\r\n\0]")}


class ServerSentEvent(NamedTuple):
    """One event.

    Attributes:
        data: The text of the event.
        event: The name of the event. Default: `message`.
        id: The id that a browser sends back as `Last-Event-ID` when it reconnects. Default: None.
        retry: The reconnection delay in milliseconds. Default: None, which leaves the client's delay unchanged.
    """

    data: str
    event: str = MESSAGE
    id: str | None = None
    retry: int | None = None


def encode(event: ServerSentEvent) -> bytes:
    """Encode an event for the wire.

    A CR or CRLF in the data arrives as LF, since the format does not distinguish line ends. No field of an event can
    inject another field or event.

    Args:
        event: The event to encode.

    Returns:
        The bytes to send, including the empty line that ends the event.

    Raises:
        InvalidDataError: The name is empty, the name or id contains a line break, the id contains a NUL, `retry` is
            negative or has more than 15 digits, or a text contains a lone surrogate.

    Example:
        `encode(ServerSentEvent("hello", id="1"))` returns `b"id: 1\\ndata: hello\\n\\n"`.
    """
    lines = []
    if event.event != MESSAGE:
        lines.append(f"event: {_one_line('event', event.event)}")
    if event.id is not None:
        lines.append(f"id: {event.id if event.id.isalnum() else _one_line('id', event.id)}")
    if event.retry is not None:
        if not 0 <= event.retry < 10**15:
            raise InvalidDataError(f"retry must be 0 to 999999999999999 milliseconds, not {event.retry}")
        lines.append(f"retry: {event.retry:d}")
    lines.append("data: " + event.data)
    if "\n" in event.data or "\r" in event.data:
        lines[-1] = _LINE_END.sub("\ndata: ", lines[-1])
    return _encoded("\n".join(lines) + "\n\n")


def comment(text: str = "") -> bytes:
    """Encode a comment, which clients ignore. Comments keep proxies from closing an idle connection.

    Args:
        text: The text of the comment; empty by default.

    Returns:
        The bytes to send.

    Raises:
        InvalidDataError: The text contains a lone surrogate.
    """
    return _encoded("".join(f": {line}\n" for line in _LINE_END.split(text)) + "\n")


def _one_line(field: str, value: str) -> str:
    if _UNSAFE[field].search(value):
        raise InvalidDataError(
            f"the {field} of a server-sent event must not contain a line break or NUL: {value[:100]!r}"
        )
    if field == "event" and not value:
        raise InvalidDataError("the name of a server-sent event must not be empty")
    return value


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidDataError("a server-sent event must not contain a lone surrogate") from None


class EventParser:
    """An incremental parser of an event stream.

    It never returns an incomplete event, such as one that the end of the connection has truncated.

    Attributes:
        last_event_id: The id to send as `Last-Event-ID` when resuming. Empty until an event with an id has arrived.
        retry: The last reconnection delay of the server in milliseconds, or None.

    Example:
        `EventParser().feed(b"id: 1\\ndata: hello\\n\\n")` returns `[ServerSentEvent("hello", id="1")]`.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False
        self._after_cr = False
        self._line: list[str] = []  # the parts of the incomplete line
        self._data: list[str] = []  # this and the following: fields of the incomplete event
        self._event = ""
        self._id: str | None = None
        self._retry: int | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with last_event_id={self.last_event_id!r}, retry={self.retry!r}>"

    def feed(self, received: bytes) -> list[ServerSentEvent]:
        """Parse the next bytes.

        Args:
            received: Any number of bytes. Events and characters may be split at any point.

        Returns:
            The events that these bytes complete.
        """
        text = self._decoder.decode(received)
        if not text:
            return []
        if not self._started:
            self._started = True
            text = text.removeprefix("\ufeff")
        if self._after_cr:
            text = text.removeprefix("\n")
            self._after_cr = False
        if text:
            self._after_cr = text.endswith("\r")
        *complete, rest = _LINE_END.split(text)
        events = []
        for line in complete:
            event = self._parse_line("".join([*self._line, line]))
            self._line = []
            if event is not None:
                events.append(event)
        if rest:
            self._line.append(rest)
        return events

    def _parse_line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id":
            if "\0" not in value:
                self._id = value
        elif field == "retry" and re.fullmatch("[0-9]{1,15}", value):
            self._retry = self.retry = int(value)
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        event = ServerSentEvent("\n".join(self._data), self._event or MESSAGE, self._id, self._retry)
        has_data = bool(self._data)
        if self._id is not None:
            self.last_event_id = self._id
        self._data, self._event, self._id, self._retry = [], "", None, None
        return event if has_data else None
