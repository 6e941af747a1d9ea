"""Wire formats: what all of them have in common, encoded event streams, and UI message streams."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aibind_postgres import InvalidDataError, StreamStatus
from aibind_postgres.sse import EventParser
from aibind_postgres.wire import NAMES, ai_sdk, find_wire
from aibind_postgres.wire.ai_sdk import AiSdkWire, OpenParts
from aibind_postgres.wire.sse import SseChunkEncoder

DONE = StreamStatus("done", None, 3)
STOPPED = StreamStatus("stopped", None, 3)
ERROR = StreamStatus("error", "it broke", 3)

# Items of one answer for each wire format. Each contains the text "Hi" in two pieces.
ITEMS = {
    "aibind": ["H", "i"],
    "ai_sdk": ["H", "i"],
    "ag_ui": [
        {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "H"},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "i"},
        {"type": "TEXT_MESSAGE_END", "messageId": "m"},
    ],
    "sse": ["data: H\n", "\ndata: i\n\n"],
}
AVAILABLE = [name for name in NAMES if name in ITEMS]


def encoded(wire, items, stream_id="s"):
    """Return the chunks of a complete answer."""
    encoder = wire.chunk_encoder(stream_id)
    return [*(chunk for item in items for chunk in encoder.encode(item)), *encoder.finish()]


def sent(wire, chunks, status, after_seq=0, stream_id="s"):
    """Return the bytes that a client gets after the chunks that it has."""
    frames = wire.frame_encoder(stream_id, after_seq)
    parts = [frames.frame(seq, chunk) for seq, chunk in enumerate(chunks, 1) if seq > after_seq]
    return b"".join([*(part or b"" for part in parts), frames.end(status)])


def test_every_wire_format_is_tested():
    assert list(NAMES) == AVAILABLE


@pytest.mark.parametrize("name", AVAILABLE)
def test_name_and_headers(name):
    wire = find_wire(name)
    assert wire.name == name
    assert wire.headers["Content-Type"] == "text/event-stream"
    assert "no-transform" in wire.headers["Cache-Control"]


@pytest.mark.parametrize("name", AVAILABLE)
def test_text_of_chunks(name):
    wire = find_wire(name)
    chunks = encoded(wire, ITEMS[name])
    assert wire.text(chunks) == ("data: H\n\ndata: i\n\n" if name == "sse" else "Hi")


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("status", [DONE, STOPPED, ERROR, None])
def test_frames_are_complete_events(name, status):
    wire = find_wire(name)
    received = sent(wire, encoded(wire, ITEMS[name]), status)
    assert received.endswith(b"\n\n")
    events = EventParser().feed(received)
    assert events
    assert ("it broke" in received.decode()) == (status == ERROR)


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_end_after_any_number_of_chunks(name):
    """A client gets whole events, also if the producer has died between any two chunks."""
    wire = find_wire(name)
    chunks = encoded(wire, ITEMS[name])
    for number in range(len(chunks) + 1):
        for status in (STOPPED, ERROR, None):
            received = sent(wire, chunks[:number], status)
            assert received == b"" or received.endswith(b"\n\n")


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("item", [None, 7, object(), ["x"]])
def test_invalid_items_raise(name, item):
    with pytest.raises(InvalidDataError):
        find_wire(name).chunk_encoder("s").encode(item)


@pytest.mark.parametrize("name", ["", "AI_SDK", "os", "../sse", "__init__", "sse\n"])
def test_unknown_name_raises(name):
    with pytest.raises(InvalidDataError, match="unknown wire format"):
        find_wire(name)


# Encoded event streams


@given(st.lists(st.sampled_from(["\n", "\r", "\r\n", "a", "data: x", ": ping", "é", "🙂"])), st.data())
def test_event_stream_is_byte_exact(parts, data):
    text = "".join(parts)
    whole = encoded(find_wire("sse"), [text])
    pieces, rest = [], text.encode()
    while rest:
        size = data.draw(st.integers(1, 5))
        pieces.append(rest[:size])
        rest = rest[size:]
    split = encoded(find_wire("sse"), pieces)
    assert "".join(whole) == text
    assert split == whole
    assert sent(find_wire("sse"), split, DONE) == text.encode()


def test_frames_of_an_event_stream():
    chunks = encoded(find_wire("sse"), ["event: a\r\ndata: 1\r\n\r\ndata: 2\n\n: ping\n\ndata: rest"])
    assert chunks == ["event: a\r\ndata: 1\r\n\r\n", "data: 2\n\n", ": ping\n\n", "data: rest"]


def test_event_stream_that_is_not_utf_8():
    with pytest.raises(InvalidDataError, match="UTF-8"):
        SseChunkEncoder().encode(b"data: \xff\n\n")
    encoder = SseChunkEncoder()
    encoder.encode("data: é".encode()[:-1])
    with pytest.raises(InvalidDataError, match="UTF-8"):
        encoder.finish()


def test_error_at_the_end_of_an_event_stream():
    assert sent(find_wire("sse"), ["data: 1\n\n"], ERROR) == b"data: 1\n\nevent: error\ndata: it broke\n\n"
    assert sent(find_wire("sse"), ["data: 1\n\n"], STOPPED) == b"data: 1\n\n"


# UI message streams

ANY_CHUNK = st.one_of(
    st.text(max_size=3),
    st.builds(ai_sdk.reasoning, st.text(max_size=3)),
    st.builds(ai_sdk.data, st.just("x"), st.none() | st.integers(), transient=st.booleans()),
    st.builds(ai_sdk.metadata, st.just({"a": 1})),
    st.builds(ai_sdk.source_url, st.just("https://example.com")),
    st.builds(ai_sdk.source_document, st.just("text/plain"), st.just("title")),
    st.builds(ai_sdk.file, st.just("data:,"), st.just("text/plain")),
    st.builds(ai_sdk.step),
    st.builds(ai_sdk.tool_input_start, st.just("call"), st.just("tool")),
    st.builds(ai_sdk.tool_input, st.just("call"), st.just("tool"), st.integers()),
    st.sampled_from(
        [
            {"type": "start", "messageId": "other", "messageMetadata": {"b": 2}},
            {"type": "start"},
            {"type": "start-step"},
            {"type": "finish-step"},
        ]
    ),
)


def check_order(chunks):
    """Check the rules that a client enforces on a complete answer."""
    assert chunks[0]["type"] == "start"
    assert [chunk["type"] for chunk in chunks].count("start") == 1
    assert [chunk["type"] for chunk in chunks].count("finish") == 1
    assert chunks[-1]["type"] == "finish"
    opened, in_step = set(), False
    for chunk in chunks:
        assert None not in [value for field, value in chunk.items() if field != "data"]
        part, _, event = chunk["type"].rpartition("-")
        if chunk["type"] == "start-step":
            assert not in_step
            in_step = True
        elif chunk["type"] == "finish-step":
            assert in_step
            in_step = False
        elif part in ("text", "reasoning"):
            key = part, chunk["id"]
            assert (key in opened) == (event != "start")
            if event == "start":
                opened.add(key)
            elif event == "end":
                opened.remove(key)
    assert not opened
    assert not in_step


@given(st.lists(ANY_CHUNK))
def test_any_items_are_a_valid_answer(items):
    chunks = [json.loads(chunk) for chunk in encoded(AiSdkWire("m"), items)]
    check_order(chunks)
    assert chunks[0]["messageId"] == "m"
    text = "".join([item for item in items if isinstance(item, str)])
    assert AiSdkWire().text(encoded(AiSdkWire("m"), items)) == text


@given(st.lists(ANY_CHUNK), st.data())
def test_answer_that_ends_anywhere_has_no_open_part(items, data):
    chunks = encoded(AiSdkWire("m"), items)
    number = data.draw(st.integers(0, len(chunks)))
    received = sent(AiSdkWire(), chunks[:number], STOPPED)
    *parsed, end = [event.data for event in EventParser().feed(received)]
    assert end == "[DONE]"
    parts = OpenParts()
    for chunk in parsed:
        parts.apply(chunk)
    assert parts.closing_chunks() == []
    assert json.loads(parsed[-1]) == {"type": "abort"}


def test_nothing_follows_the_end():
    encoder = AiSdkWire("m").chunk_encoder("s")
    encoder.encode({"type": "finish"})
    assert encoder.finish() == []
    for item in ({"type": "finish-step"}, {"type": "finish"}, {"type": "abort"}, ai_sdk.encoded("data: [DONE]\n\n")):
        assert encoder.encode(item) == []
    for item in ("text", ai_sdk.reasoning("x"), ai_sdk.step(), ai_sdk.data("x", 1)):
        with pytest.raises(InvalidDataError, match="after the end"):
            encoder.encode(item)


@pytest.mark.parametrize(
    ("wire", "item"), [(AiSdkWire("m"), ai_sdk.encoded("plain text")), (find_wire("ag_ui"), "plain text")]
)
def test_texts_in_place_of_events_are_refused(wire, item):
    encoder = wire.chunk_encoder("s")
    assert list(encoder.encode(item)) == []
    with pytest.raises(InvalidDataError, match="no event"):
        encoder.finish()


def test_chunk_of_another_writer_may_have_line_breaks():
    received = sent(AiSdkWire(), ['{"type":\n"start"}'], DONE)
    first, _ = EventParser().feed(received)
    assert json.loads(first.data) == {"type": "start"}


def test_chunks_that_are_not_json_do_not_break_the_end():
    received = sent(AiSdkWire(), ["no json", "[]", '{"type":7}'], STOPPED)
    assert received.endswith(b'data: {"type":"abort"}\n\ndata: [DONE]\n\n')
