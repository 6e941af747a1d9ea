"""Server-Sent Events: what goes over the wire, and what a reader makes of any bytes that come."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aibind_postgres import InvalidDataError
from aibind_postgres.sse import EventParser, ServerSentEvent, comment, encode

# All that Unicode has; and, more often, what the format gives a meaning.
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
    """Read bytes in pieces that end at these places."""
    parser = EventParser()
    places = [0, *sorted(place % (len(wire) + 1) for place in cuts or []), len(wire)]
    return [event for begin, end in pairwise(places) for event in parser.feed(wire[begin:end])]


def arrived(event: ServerSentEvent) -> ServerSentEvent:
    """Return an event as it arrives: the format has one line end only."""
    return event._replace(data=re.sub(r"\r\n|\r", "\n", event.data))


@given(st.lists(EVENTS), st.lists(st.integers(0)), st.sampled_from(["\n", "\r", "\r\n"]))
@example([ServerSentEvent("\ufeff")], [1, 2], "\n")
@example([ServerSentEvent("a\r\n\rb\n")], [], "\r")
def test_what_is_encoded_is_read_in_pieces_of_any_size_and_with_any_line_end(events, cuts, line_end):
    wire = b"".join(comment("ping\r\n\r\ndata: forged") + encode(event) for event in events)
    assert parse(wire.replace(b"\n", line_end.encode()), cuts) == [arrived(event) for event in events]


@given(
    st.binary()
    | st.lists(st.sampled_from([b"data", b"id", b":", b" ", b"\r", b"\n", b"\xef\xbb\xbf", b"x"])).map(b"".join)
)
@example(b"\xff\xfe\ndata: \xc3\n\n")
def test_any_bytes_are_read_alike_whole_and_one_by_one(wire):
    assert parse(wire, list(range(len(wire)))) == parse(wire)


@given(EVENTS, EVENTS)
def test_data_forges_nothing(first, second):
    """Each event is one, whatever the data looks like."""
    forged = ServerSentEvent(encode(first).decode(), first.event, first.id, first.retry)
    assert parse(encode(forged) + encode(second)) == [arrived(forged), arrived(second)]


def test_what_goes_over_the_wire():
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
        # And its rules.
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
def test_the_rules_for_reading(wire, events):
    assert parse(wire) == events


def test_a_reader_knows_where_to_resume_and_when():
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
def test_what_cannot_be_told_is_refused(event):
    with pytest.raises(InvalidDataError):
        encode(event)


def test_a_long_line_in_small_pieces_takes_no_longer_than_it_has_to():
    """Each piece is looked at once, and not all that came before it again."""
    parser = EventParser()
    for _ in range(200_000):
        assert parser.feed(b"data: x" if not parser._line else b"xxxxx") == []
    [event] = parser.feed(b"\n\n")
    assert len(event.data) == 1 + 5 * 199_999
