"""Server-Sent Events: what a server sends, and how a client reads it. Pure.

The format and the rules for reading it are those of the HTML standard, section 9.2, "Server-sent events" (WHATWG).
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from .errors import InvalidDataError

MESSAGE = "message"  # the name of an event that has none

_LINE_END = re.compile(r"\r\n|\n|\r")
_UNSAFE = {"event": re.compile(r"[\r\n]"), "id": re.compile(r"[\r\n\0]")}


class ServerSentEvent(NamedTuple):
    """One event. `id` is what a browser sends back as `Last-Event-ID`; `retry`, in milliseconds, is its next pause."""

    data: str
    event: str = MESSAGE
    id: str | None = None
    retry: int | None = None


def encode(event: ServerSentEvent) -> bytes:
    """Return an event as it goes over the wire.

    A CR or CRLF in the data arrives as LF: the format has no way to tell them. Nothing in an event can pass for another
    field or event: a name or an id with a line break, an id with a NUL, a name that is empty, a retry that is no time,
    and text that is not Unicode raise `InvalidDataError`.
    """
    lines = []
    if event.event != MESSAGE:
        lines.append(f"event: {_one_line('event', event.event)}")
    if event.id is not None:
        lines.append(f"id: {_one_line('id', event.id)}")
    if event.retry is not None:
        if not 0 <= event.retry < 10**15:
            raise InvalidDataError(f"retry must be milliseconds from 0, of 15 digits at most, not {event.retry}")
        lines.append(f"retry: {event.retry:d}")
    lines += [f"data: {line}" for line in _LINE_END.split(event.data)]
    return _encoded("\n".join(lines) + "\n\n")


def comment(text: str = "") -> bytes:
    """Return a comment, which a client passes over: it keeps what is in between from closing a quiet connection."""
    return _encoded("".join(f": {line}\n" for line in _LINE_END.split(text)) + "\n")


def _one_line(field: str, value: str) -> str:
    if _UNSAFE[field].search(value):
        raise InvalidDataError(f"the {field} of a server-sent event must not contain a line break or NUL")
    if field == "event" and not value:
        raise InvalidDataError("the name of a server-sent event must not be empty")
    return value


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidDataError("a server-sent event contains a lone surrogate, which is not a character") from None


class EventParser:
    """Reads events from bytes as they come, in pieces of any size.

    `last_event_id` is the id to resume after, `retry` the pause before that, in milliseconds, if the server gave one.
    An event that the end of the connection has cut off is never returned.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False
        self._after_cr = False
        self._line: list[str] = []  # pieces of a line that is not complete
        self._data: list[str] = []  # and the fields of an event that is not
        self._event = ""
        self._id: str | None = None
        self._retry: int | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with last_event_id={self.last_event_id!r}, retry={self.retry!r}>"

    def feed(self, received: bytes) -> list[ServerSentEvent]:
        """Take the next bytes and return the events that they complete."""
        text = self._decoder.decode(received)
        if not text:
            return []
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\ufeff")
        if self._after_cr:
            text = text.removeprefix("\n")
            self._after_cr = False
        if text:
            self._after_cr = text.endswith("\r")
        *complete, rest = _LINE_END.split(text)
        events = []
        for line in complete:
            event = self._take("".join([*self._line, line]))
            self._line = []
            if event is not None:
                events.append(event)
        if rest:
            self._line.append(rest)
        return events

    def _take(self, line: str) -> ServerSentEvent | None:
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
