"""Encoding and parsing of Server-Sent Events."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aibind_postgres import InvalidDataError
from aibind_postgres.sse import EventParser, ServerSentEvent, comment, encode

# Any Unicode text, or a text of characters with a meaning in the format.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("\r\n\0: \ufeffdata\x01é"))
LINES = TEXTS.filter(lambda text: not re.search(r"[\r\n]", text))
PIECES = [b"data", b"id", b":", b" ", b"\r", b"\n", b"\xef\xbb\xbf", b"x"]
EVENTS = st.builds(
    ServerSentEvent,
    TEXTS,
    LINES.filter(bool),
    st.none() | LINES.filter(lambda text: "\0" not in text),
    st.none() | st.integers(0, 10**15 - 1),
)


def parse(wire: bytes, cuts: list[int] | None = None) -> list[ServerSentEvent]:
    """Parse bytes in pieces, split at the offsets `cuts`."""
    parser = EventParser()
    offsets = [0, *sorted(offset % (len(wire) + 1) for offset in cuts or []), len(wire)]
    return [event for begin, end in pairwise(offsets) for event in parser.feed(wire[begin:end])]


def normalized(event: ServerSentEvent) -> ServerSentEvent:
    """Return an event with LF as its only line ending, as a client receives it."""
    return event._replace(data=re.sub(r"\r\n|\r", "\n", event.data))


@given(st.lists(EVENTS), st.lists(st.integers(0)), st.sampled_from(["\n", "\r", "\r\n"]))
@example([ServerSentEvent("\ufeff")], [1, 2], "\n")
@example([ServerSentEvent("a\r\n\rb\n")], [], "\r")
def test_round_trip_in_pieces_of_any_size_with_any_line_ending(events, cuts, line_end):
    wire = b"".join(comment("ping\r\n\r\ndata: forged") + encode(event) for event in events)
    assert parse(wire.replace(b"\n", line_end.encode()), cuts) == [normalized(event) for event in events]


@given(st.binary() | st.lists(st.sampled_from(PIECES)).map(b"".join))
@example(b"\xff\xfe\ndata: \xc3\n\n")
def test_any_bytes_parse_alike_whole_and_byte_by_byte(wire):
    assert parse(wire, list(range(len(wire)))) == parse(wire)


@given(EVENTS, EVENTS)
def test_data_cannot_inject_events(first, second):
    forged = ServerSentEvent(encode(first).decode(), first.event, first.id, first.retry)
    assert parse(encode(forged) + encode(second)) == [normalized(forged), normalized(second)]


def test_wire_format():
    assert encode(ServerSentEvent("one\ntwo", "usage", "7", 3000)) == (
        b"event: usage\nid: 7\nretry: 3000\ndata: one\ndata: two\n\n"
    )
    assert encode(ServerSentEvent("")) == b"data: \n\n"
    assert encode(ServerSentEvent("a\r\nb\rc\n", id="1")) == b"id: 1\ndata: a\ndata: b\ndata: c\ndata: \n\n"
    assert comment("ping") == b": ping\n\n"
    assert comment() == b": \n\n"


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        # The examples of the standard.
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [ServerSentEvent("YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event",
            [ServerSentEvent("first event", id="1"), ServerSentEvent("second event", id="")],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [ServerSentEvent(""), ServerSentEvent("\n")]),
        (b"data:test\n\ndata: test\n\n", [ServerSentEvent("test")] * 2),
        # The parsing rules of the standard.
        (b"event: x\n\ndata: y\n\n", [ServerSentEvent("y")]),
        (b"event: a\nevent: b\ndata: y\n\n", [ServerSentEvent("y", "b")]),
        (b"event:\ndata: y\n\n", [ServerSentEvent("y")]),
        (b"data:   y\n\n", [ServerSentEvent("  y")]),
        (b"id: a\0b\ndata: y\n\n", [ServerSentEvent("y")]),
        (b"retry: 1x\ndata: y\n\n", [ServerSentEvent("y")]),
        (b"retry: -1\ndata: y\n\n", [ServerSentEvent("y")]),
        (b"retry: " + b"9" * 9999 + b"\ndata: y\n\n", [ServerSentEvent("y")]),
        (b"Data: y\nother: z\ndata : y\n\n", []),
        (b"\xef\xbb\xbfdata: y\n\n", [ServerSentEvent("y")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: y\n\n", []),
        ("data: a\u2028b\x85c\x0b\n\n".encode(), [ServerSentEvent("a\u2028b\x85c\x0b")]),
        (b"data: \xff\n\n", [ServerSentEvent("\ufffd")]),
        (b"data: cut off\n", []),
    ],
)
def test_parsing_rules(wire, events):
    assert parse(wire) == events


def test_last_event_id_and_retry():
    parser = EventParser()
    assert (parser.last_event_id, parser.retry) == ("", None)
    parser.feed(b"id: 1\ndata: x\n\nretry: 50\n\ndata: without an id\n\n")
    assert (parser.last_event_id, parser.retry) == ("1", 50)
    parser.feed(b"id: 2\n")
    assert parser.last_event_id == "1"
    parser.feed(b"\n")
    assert parser.last_event_id == "2"
    parser.feed(b"id: 3\ndata: cut o")
    assert parser.last_event_id == "2"


@pytest.mark.parametrize(
    "event",
    [
        ServerSentEvent("x", "a\nb"),
        ServerSentEvent("x", "a\r"),
        ServerSentEvent("x", ""),
        ServerSentEvent("x", id="1\ndata: forged"),
        ServerSentEvent("x", id="\0"),
        ServerSentEvent("\ud800"),
        ServerSentEvent("x", retry=-1),
        ServerSentEvent("x", retry=10**15),
    ],
)
def test_invalid_event_raises(event):
    with pytest.raises(InvalidDataError):
        encode(event)


def test_long_line_in_small_pieces():
    parser = EventParser()
    for piece in [b"data: x", *[b"xxxxx"] * 199_999]:
        assert parser.feed(piece) == []
    [event] = parser.feed(b"\n\n")
    assert len(event.data) == 1 + 5 * 199_999
