"""The wire format of AG-UI: the forms of events, the events it adds, and the end in each state."""

from __future__ import annotations

import enum
import json
from typing import Any

import pytest

from aibind_postgres import InvalidDataError, StreamStatus
from aibind_postgres.wire import find_wire
from aibind_postgres.wire.ag_ui import WIRE, AgUiWire, event_type

START = {"type": "RUN_STARTED", "threadId": "t", "runId": "r", "protocolVersion": "1.0"}
FINISH = {"type": "RUN_FINISHED", "threadId": "t", "runId": "r"}
CANCEL = {**FINISH, "outcome": {"type": "cancelled"}}
OPEN = {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"}
DELTA = {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "Grüß\r\n dich"}
CLOSE = {"type": "TEXT_MESSAGE_END", "messageId": "m"}
STOPPED = StreamStatus("stopped", None, 1)
DONE = StreamStatus("done", None, 1)
FAILED = StreamStatus("error", "out of tokens", 1)


def encoded(events: list[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def stored(items: list[Any]) -> list[str]:
    encoder = AgUiWire("t").chunk_encoder("r")
    chunks = [chunk for item in items for chunk in encoder.encode(item)]
    return [*chunks, *encoder.finish()]


def produced(items: list[Any]) -> list[dict[str, Any]]:
    return [json.loads(chunk) for chunk in stored(items)]


def received(frames: bytes) -> list[dict[str, Any]]:
    *blocks, rest = frames.decode().split("\n\n")
    assert rest == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


def end_after(events: list[dict[str, Any]], status: StreamStatus | None, after_seq: int = 0) -> list[dict[str, Any]]:
    """Return the events that a client gets after those of the stream."""
    frames = AgUiWire("t").frame_encoder("r", after_seq)
    for seq, event in enumerate(events[after_seq:], after_seq + 1):
        assert received(frames.frame(seq, json.dumps(event, separators=(",", ":")))) == [event]
    return received(frames.end(status))


def test_name_and_headers() -> None:
    assert find_wire("ag_ui") is WIRE
    assert WIRE.name == "ag_ui"
    assert WIRE.headers["Content-Type"] == "text/event-stream"


def test_run_is_started_and_finished() -> None:
    assert produced([OPEN, DELTA, CLOSE]) == [START, OPEN, DELTA, CLOSE, FINISH]
    assert produced([]) == [START, FINISH]
    assert [json.loads(chunk)["threadId"] for chunk in WIRE.chunk_encoder("r").finish()] == ["r", "r"]


def test_events_of_the_source_are_not_repeated() -> None:
    own = {"type": "RUN_STARTED", "threadId": "other", "runId": "other run", "input": {"messages": []}}
    interrupted = {**FINISH, "outcome": {"type": "interrupt", "interrupts": [{"id": "i", "reason": "approval"}]}}
    failed = {"type": "RUN_ERROR", "message": "no"}
    assert produced([own, interrupted]) == [own, interrupted]
    assert produced([failed]) == [START, failed]
    assert produced([own]) == [own, {"type": "RUN_FINISHED", "threadId": "other", "runId": "other run"}]


def test_several_runs() -> None:
    second = {**START, "runId": "r2"}
    assert produced([START, OPEN, FINISH, second, DELTA]) == [
        START,
        OPEN,
        FINISH,
        second,
        DELTA,
        {**FINISH, "runId": "r2"},
    ]


@pytest.mark.parametrize("form", ["str", "bytes"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_encoded_events_split_anywhere(form: str, size: int) -> None:
    events = [START, OPEN, DELTA, {**DELTA, "delta": "\U0001f642"}, CLOSE, FINISH]
    text = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    whole = text if form == "str" else text.encode()
    assert produced([whole[at : at + size] for at in range(0, len(whole), size)]) == events
    # After text that was split, the next item may be a complete event.
    assert produced([whole[:5], whole[5:-20], whole[-20:], encoded([START]), encoded([FINISH])]) == [
        *events,
        START,
        FINISH,
    ]


def test_encoded_events_in_unusual_forms() -> None:
    delta = json.dumps(DELTA, indent=1).replace("\n", "\ndata: ")
    items = [f": ping\n\nid: 7\nevent: x\ndata:{json.dumps(OPEN)}\r\n\r\n", f"data: {delta}\n\n", b"", "data: "]
    items += [json.dumps(CLOSE)]  # without the empty line, at the end
    assert produced(items) == [START, OPEN, DELTA, CLOSE, FINISH]
    assert all("\n" not in chunk for chunk in stored(items))


def test_type_comes_first() -> None:
    """So that readers find it without parsing the event."""
    reordered = {"messageId": "m", "delta": "a", "type": "TEXT_MESSAGE_CONTENT"}
    for item in (reordered, encoded([reordered])):
        assert stored([item])[1] == '{"type":"TEXT_MESSAGE_CONTENT","messageId":"m","delta":"a"}'


class Kind(str, enum.Enum):
    CUSTOM = "CUSTOM"


class Model:
    def __init__(self, text: str) -> None:
        self.text = text

    def model_dump_json(self, *, by_alias: bool) -> str:
        return self.text if by_alias else "{}"


def test_models_and_dicts() -> None:
    custom = {"type": "CUSTOM", "name": "n", "value": {"a": None}}
    assert produced([{**custom, "type": Kind.CUSTOM}])[1] == custom
    assert produced([Model(json.dumps(custom, separators=(",", ":")))])[1] == custom
    assert produced([Model('{"name":"n","value":{"a":null},"type":"CUSTOM"}')])[1] == custom


def test_events_of_ag_ui_core() -> None:
    core = pytest.importorskip("ag_ui.core")
    patch = core.StateDeltaEvent(delta=[{"op": "replace", "path": "/a", "value": None}])
    items = [core.TextMessageStartEvent(message_id="m"), patch, core.TextMessageEndEvent(message_id="m")]
    assert produced(items) == [
        START,
        {"type": "TEXT_MESSAGE_START", "messageId": "m"},
        {"type": "STATE_DELTA", "delta": [{"op": "replace", "path": "/a", "value": None}]},
        CLOSE,
        FINISH,
    ]


def test_lone_surrogates_and_nul() -> None:
    [_, chunk, _] = stored([{**DELTA, "delta": "\ud83d\x00"}])
    assert r"\ud83d\u0000" in chunk
    assert json.loads(chunk)["delta"] == "\ud83d\x00"


@pytest.mark.parametrize(
    "item",
    [
        7,
        None,
        {},
        {"type": 3},
        {"type": ""},
        {"type": "CUSTOM", "value": float("nan")},
        {"type": "CUSTOM", "value": object()},
        "data: [DONE]\n\n",
        'data: "text"\n\n',
        "data: {}\n\n",
        'data: {"type":"CUSTOM","value":NaN}\n\n',
        "data: " + "[" * 100_000 + "\n\n",
        'data: {"type":"CUSTOM","value":\n\n',
        b"data: \xff\n\n",
        'x\ndata: {"type":"CUSTOM","value":"\ud83d"}\n\n',
    ],
)
def test_invalid_items(item: object) -> None:
    with pytest.raises(InvalidDataError):
        stored([item])


def test_truncated_bytes() -> None:
    with pytest.raises(InvalidDataError, match="UTF-8"):
        stored([b'data: {"type":"CUSTOM"}\n\n\xc3'])


def test_event_of_two_lines_that_looks_like_two_events() -> None:
    custom = {"type": "CUSTOM", "name": "n", "value": 1}
    assert produced(['data: {"type":"CUSTOM","name":"n",\n', 'data: "value":1}\n\n']) == [START, custom, FINISH]


# Each open part, and the event that closes it.
PARTS = [
    (OPEN, CLOSE),
    ({"type": "TOOL_CALL_START", "toolCallId": "c", "toolCallName": "n"}, {"type": "TOOL_CALL_END", "toolCallId": "c"}),
    ({"type": "REASONING_START", "messageId": "r"}, {"type": "REASONING_END", "messageId": "r"}),
    (
        {"type": "REASONING_MESSAGE_START", "messageId": "r", "role": "reasoning"},
        {"type": "REASONING_MESSAGE_END", "messageId": "r"},
    ),
    ({"type": "STEP_STARTED", "stepName": "s"}, {"type": "STEP_FINISHED", "stepName": "s"}),
    (
        {"type": "STEP_STARTED", "stepName": "s", "subagentRunId": "a"},
        {"type": "STEP_FINISHED", "stepName": "s", "subagentRunId": "a"},
    ),
    ({"type": "THINKING_START", "title": "t"}, {"type": "THINKING_END"}),
    ({"type": "THINKING_TEXT_MESSAGE_START"}, {"type": "THINKING_TEXT_MESSAGE_END"}),
]
SUBAGENT = {"type": "SUBAGENT_STARTED", "subagentRunId": "a", "name": "n"}


def test_stop_closes_the_open_parts_last_one_first() -> None:
    opening = [opened for opened, _ in PARTS]
    closing = [closed for _, closed in reversed(PARTS)]
    assert end_after([START, *opening], STOPPED) == [*closing, CANCEL]
    assert end_after([START, SUBAGENT, OPEN], STOPPED) == [
        CLOSE,
        {"type": "SUBAGENT_ERROR", "subagentRunId": "a", "message": "the run was stopped", "code": "cancelled"},
        CANCEL,
    ]
    assert end_after([START, SUBAGENT, {"type": "SUBAGENT_ERROR", "subagentRunId": "a"}], STOPPED) == [CANCEL]


@pytest.mark.parametrize(("opened", "closed"), PARTS)
def test_closed_parts_are_not_closed_again(opened: dict[str, Any], closed: dict[str, Any]) -> None:
    assert end_after([START, opened, closed], STOPPED) == [CANCEL]
    assert produced([opened, closed]) == [START, opened, closed, FINISH]
    assert produced([opened]) == [START, opened, closed, FINISH]


def test_steps_of_two_agents_have_the_same_name() -> None:
    (outer, outer_end), (inner, inner_end) = PARTS[4], PARTS[5]
    assert end_after([START, outer, inner, inner_end], STOPPED) == [outer_end, CANCEL]


def test_end_by_state() -> None:
    assert end_after([START, OPEN, CLOSE, FINISH], DONE) == []
    assert end_after([START, OPEN], FAILED) == [{"type": "RUN_ERROR", "message": "out of tokens"}]
    assert end_after([START], StreamStatus("error", None, 1)) == [
        {"type": "RUN_ERROR", "message": "the answer was interrupted"}
    ]
    assert end_after([START, OPEN], None) == [{"type": "RUN_ERROR", "message": "the answer was deleted"}]


def test_end_before_the_first_event_begins_with_the_start() -> None:
    assert end_after([], FAILED) == [START, {"type": "RUN_ERROR", "message": "out of tokens"}]
    assert end_after([], STOPPED) == [START, CANCEL]
    assert end_after([], None) == [START, {"type": "RUN_ERROR", "message": "the answer was deleted"}]


def test_end_of_a_run_that_has_ended() -> None:
    error = {"type": "RUN_ERROR", "message": "no"}
    for status in (STOPPED, FAILED, None):
        assert end_after([START, error], status) == []
    for status in (STOPPED, None):
        assert end_after([START, FINISH], status) == []
    # The client accepts this event after RUN_FINISHED, such as if saving the answer has failed.
    assert end_after([START, FINISH], FAILED) == [{"type": "RUN_ERROR", "message": "out of tokens"}]


def test_end_of_the_second_run() -> None:
    second = {**START, "threadId": "t2", "runId": "r2"}
    assert end_after([START, OPEN, FINISH, second], STOPPED) == [{**CANCEL, "threadId": "t2", "runId": "r2"}]


def test_end_for_a_client_that_began_later() -> None:
    events = [START, OPEN, DELTA]
    assert end_after(events, STOPPED, 2) == [
        {"type": "RUN_ERROR", "message": "the run was stopped", "code": "cancelled"}
    ]
    assert end_after(events, FAILED, 2) == [{"type": "RUN_ERROR", "message": "out of tokens"}]


def test_chunks_of_other_writers() -> None:
    """Chunks that `append` has written need not be events."""
    frames = AgUiWire("t").frame_encoder("r", 0)
    assert frames.frame(1, "a\n\nb") == b"data: a\ndata: \ndata: b\n\n"
    for chunk in (
        '{"type":"TEXT_MESSAGE_START",',
        '{"type":"STEP_STARTED","stepName":[]}',
        "[]",
        '{"type":"STEP_STARTED"}',
    ):
        frames.frame(2, chunk)
    frames.frame(3, '{ "messageId": "m", "type": "TEXT_MESSAGE_START" }')
    assert received(frames.end(STOPPED)) == [START, CLOSE, CANCEL]


def test_deltas_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = stored([OPEN, DELTA, CLOSE])
    frames = AgUiWire("t").frame_encoder("r", 0)
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    for seq, chunk in enumerate(chunks, 1):
        frames.frame(seq, chunk)
    assert [event_type(chunk) for chunk in parsed] == ["TEXT_MESSAGE_START", "TEXT_MESSAGE_END"]


def test_text() -> None:
    chunk = {"type": "TEXT_MESSAGE_CHUNK", "messageId": "n", "delta": "!"}
    others = [{"type": "TOOL_CALL_ARGS", "toolCallId": "c", "delta": "{}"}, {"type": "TEXT_MESSAGE_CHUNK"}]
    assert WIRE.text(stored([OPEN, DELTA, CLOSE, *others, chunk])) == DELTA["delta"] + "!"
