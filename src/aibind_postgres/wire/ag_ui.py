"""The wire format of AG-UI 1.0: the items of a source are the events of a run, and each event is one chunk. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._encoded_events import EncodedEvents
from .._json import compact_json, parse_object, reject_constant
from ..errors import InvalidDataError
from ..models import StreamStatus
from ..sse import ServerSentEvent, encode
from . import DELETED, EVENT_STREAM, INTERRUPTED, FrameEncoder, WireName

PROTOCOL_VERSION = "1.0"

STOPPED = "the run was stopped"
CANCELLED = "cancelled"

# By event type: the event that closes what it opens, and the field with the id. The THINKING events, which have no ids,
# are those of older versions. The published client accepts them.
OPENING = {
    "TEXT_MESSAGE_START": ("TEXT_MESSAGE_END", "messageId"),
    "TOOL_CALL_START": ("TOOL_CALL_END", "toolCallId"),
    "REASONING_START": ("REASONING_END", "messageId"),
    "REASONING_MESSAGE_START": ("REASONING_MESSAGE_END", "messageId"),
    "STEP_STARTED": ("STEP_FINISHED", "stepName"),
    "SUBAGENT_STARTED": ("SUBAGENT_FINISHED", "subagentRunId"),
    "THINKING_START": ("THINKING_END", None),
    "THINKING_TEXT_MESSAGE_START": ("THINKING_TEXT_MESSAGE_END", None),
}
CLOSING = {end: (end, field) for end, field in OPENING.values()} | {
    "SUBAGENT_ERROR": ("SUBAGENT_FINISHED", "subagentRunId")
}
ENDS = ("RUN_FINISHED", "RUN_ERROR")
TEXTS = ("TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_CHUNK")

_PREFIX = '{"type":"'  # of every chunk that this module encodes, so that its type is found without parsing it


class AgUiWire:
    """The items are events of AG-UI, in any of these forms:

    - an object of `ag_ui.core` 1.0 or later
    - a `dict` with the keys of the protocol, such as `{"type": "TEXT_MESSAGE_START", "messageId": "m"}`
    - `str` or `bytes`: events that another library has encoded, such as `AGUIAdapter.encode_stream` of pydantic-ai. The
      items may split them anywhere.

    The encoder adds RUN_STARTED at the beginning and RUN_FINISHED at the end, unless the source has sent its own.

    Args:
        thread_id: The thread id for the events that the encoder adds. Default: the stream id, which is also the run id.
    """

    name: WireName = "ag_ui"
    headers: Mapping[str, str] = EVENT_STREAM

    def __init__(self, thread_id: str | None = None) -> None:
        self._thread_id = thread_id

    def chunk_encoder(self, stream_id: str) -> AgUiChunkEncoder:
        return AgUiChunkEncoder(self._run(stream_id))

    def frame_encoder(self, stream_id: str, after_seq: int) -> AgUiFrameEncoder:
        return AgUiFrameEncoder(self._run(stream_id), after_seq)

    def text(self, chunks: Iterable[str]) -> str:
        deltas = [parse_object(chunk).get("delta") for chunk in chunks if event_type(chunk) in TEXTS]
        return "".join([delta for delta in deltas if isinstance(delta, str)])

    def _run(self, stream_id: str) -> RunState:
        return RunState(self._thread_id or stream_id, stream_id)


class RunState:
    """The state of a run after some of its events: whether it has started and ended, and what is open in it.

    It parses only events that open or close something. They are short, and most events are deltas.
    """

    def __init__(self, thread_id: str, run_id: str) -> None:
        self.is_started = False
        self.end: str | None = None  # the type of the event that has ended the run
        self._ids = {"threadId": thread_id, "runId": run_id}
        self._start = ""  # the last RUN_STARTED, which may contain a long history
        self._open: dict[tuple[Any, ...], dict[str, Any]] = {}  # the events that close the open parts

    def apply(self, chunk: str) -> None:
        """Update the state by the next event."""
        kind = event_type(chunk)
        if kind in OPENING:
            self._change(parse_object(chunk), *OPENING[kind], is_open=True)
        elif kind in CLOSING:
            self._change(parse_object(chunk), *CLOSING[kind], is_open=False)
        elif kind == "RUN_STARTED":  # a stream may contain several runs
            self.is_started, self.end, self._start = True, None, chunk
            self._open.clear()
        elif kind in ENDS:
            self.end = kind

    def start(self) -> str:
        """Return RUN_STARTED."""
        return encode_event({"type": "RUN_STARTED", **self._ids, "protocolVersion": PROTOCOL_VERSION})

    def finish(self, *, cancelled: bool = False) -> list[str]:
        """Return the events that close the open parts, the last one first, and RUN_FINISHED."""
        events: list[dict[str, Any]] = []
        for closing in reversed(self._open.values()):
            if cancelled and closing["type"] == "SUBAGENT_FINISHED":
                closing = {**closing, "type": "SUBAGENT_ERROR", "message": STOPPED, "code": CANCELLED}
            events.append(closing)
        ids = self._ids
        if self._start:
            start = parse_object(self._start)
            ids = {name: start.get(name, value) for name, value in ids.items()}
        outcome = {"outcome": {"type": CANCELLED}} if cancelled else {}
        return [encode_event(event) for event in (*events, {"type": "RUN_FINISHED", **ids, **outcome})]

    def _change(self, event: Mapping[str, Any], end: str, field: str | None, *, is_open: bool) -> None:
        ids = {} if field is None else {field: event.get(field)}
        if "subagentRunId" in event:
            ids["subagentRunId"] = event["subagentRunId"]
        if not all(isinstance(value, str) for value in ids.values()):
            return  # invalid: the client refuses it
        # The names of steps are unique within one agent.
        key = end, ids.get(field or ""), ids.get("subagentRunId") if end == "STEP_FINISHED" else None
        if is_open:
            self._open[key] = {"type": end, **ids}
        else:
            self._open.pop(key, None)


class AgUiChunkEncoder:
    """Encodes each event as one chunk: a JSON object that begins with the type."""

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._encoded = EncodedEvents()

    def encode(self, item: Any) -> Sequence[str]:
        if isinstance(item, (str, bytes)):
            return self._add([normalise_event(data) for data in self._encoded.feed(item)])
        if isinstance(item, Mapping):
            return self._add([encode_event(item)])
        dump = getattr(item, "model_dump_json", None)
        if dump is None:
            raise InvalidDataError(f"an item must be an event of AG-UI, a dict, str or bytes, not {_type_name(item)}")
        # Without `exclude_none`, which would also remove the null that a JSON Patch assigns. `ag_ui.core` itself leaves
        # out the optional fields that are not set.
        chunk: str = dump(by_alias=True)
        return self._add([chunk if chunk.startswith(_PREFIX) else normalise_event(chunk)])

    def finish(self) -> Sequence[str]:
        chunks = self._add([normalise_event(data) for data in self._encoded.finish()])
        if not self._run.is_started:
            chunks += self._add([self._run.start()])
        return chunks if self._run.end else chunks + self._run.finish()

    def _add(self, events: list[str]) -> list[str]:
        if events and not self._run.is_started and event_type(events[0]) != "RUN_STARTED":
            events = [self._run.start(), *events]
        for event in events:
            self._run.apply(event)
        return events


class AgUiFrameEncoder(FrameEncoder):
    """Encodes each chunk as one frame, and adds an end according to the state of the stream:

    - stopped: the events that close the open parts, and RUN_FINISHED with the outcome `cancelled`. A client that has
      resumed after a chunk gets RUN_ERROR with the code `cancelled`, since its open parts are unknown.
    - error, also of an abandoned stream: RUN_ERROR with the text, even after RUN_FINISHED.
    - deleted: RUN_ERROR.

    A run that has ended before it was stopped or deleted gets no other end. If there is no event, RUN_STARTED precedes
    the end.
    """

    def __init__(self, run: RunState, after_seq: int) -> None:
        self._run = run
        self._is_whole = after_seq == 0  # otherwise, the state of the run is unknown

    def frame(self, seq: int, chunk: str) -> bytes:
        self._run.apply(chunk)
        return _frame(chunk)

    def end(self, status: StreamStatus | None) -> bytes:
        events: list[str] = []
        if status is None:
            events = [] if self._run.end else [_error(DELETED)]
        elif status.state == "error":  # may follow RUN_FINISHED, such as if saving the answer failed
            events = [] if self._run.end == "RUN_ERROR" else [_error(status.error or INTERRUPTED)]
        elif status.state == "stopped" and not self._run.end:
            # The client accepts RUN_ERROR with open parts.
            events = self._run.finish(cancelled=True) if self._is_whole else [_error(STOPPED, CANCELLED)]
        if events and self._is_whole and not self._run.is_started:
            events = [self._run.start(), *events]
        return b"".join(map(_frame, events))


def event_type(chunk: str) -> str | None:
    """Return the type of an encoded event. None if the chunk is not an event."""
    if chunk.startswith(_PREFIX):
        return chunk[len(_PREFIX) : chunk.find('"', len(_PREFIX))]
    kind = parse_object(chunk).get("type")  # written with `append`
    return kind if isinstance(kind, str) else None


def normalise_event(data: str) -> str:
    """Return an event that another library has encoded as a chunk. Raise `InvalidDataError` if it is not an event."""
    try:
        event = json.loads(data, parse_constant=reject_constant)
    except (ValueError, RecursionError):
        raise InvalidDataError(f"an event must be a JSON object, not {data[:100]!r}") from None
    if data.startswith(_PREFIX) and "\n" not in data:
        return data
    return encode_event(event)


def encode_event(event: Any) -> str:
    """Encode an event as a chunk. Raise `InvalidDataError` if it has no type, or is not a JSON object."""
    kind = event.get("type") if isinstance(event, Mapping) else None
    if not isinstance(kind, str) or not kind:
        raise InvalidDataError(f"an event of AG-UI must be an object with a type, not {_type_name(event)} without one")
    ordered = {"type": kind, **event}
    try:
        return compact_json(ordered)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(f"an event of AG-UI must be a JSON object: {error}") from None


def _error(text: str, code: str | None = None) -> str:
    return encode_event({"type": "RUN_ERROR", "message": text} | ({} if code is None else {"code": code}))


def _frame(chunk: str) -> bytes:
    return encode(ServerSentEvent(chunk))


def _type_name(value: object) -> str:
    return type(value).__name__


WIRE = AgUiWire()
