"""The wire format of the AI SDK: UI message streams, for `useChat` and other clients of `ai` 5, 6 and 7. Pure.

Follows the schemas of the chunks in npm `ai` 5.0.277, 6.0.326 and 7.0.173. A client rejects the whole answer if it gets
a chunk that its major version does not know, or a part that was not opened. So the encoder refuses such chunks.

The items of a source are:

- `str`: text of the model. The encoder opens and closes the text part.
- `reasoning(text)`: the same for reasoning.
- A `dict`: one chunk, such as the other functions of this module return. Optional fields that are None are left out.
- `frames(text)`: chunks that another library has encoded as an event stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..errors import InvalidDataError, WebError
from ..history import new_id
from ..models import StreamStatus
from ..sse import EventParser, ServerSentEvent, encode
from . import DELETED, EVENT_STREAM, INTERRUPTED, FrameEncoder, WireName

SdkVersion = Literal[5, 6, 7]

# The required fields of each type of chunk. `data-NAME` is a family of types.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "start": (),
    "start-step": (),
    "finish-step": (),
    "reset-step": (),
    "finish": (),
    "abort": (),
    "error": ("errorText",),
    "message-metadata": ("messageMetadata",),
    "text-start": ("id",),
    "text-delta": ("id", "delta"),
    "text-end": ("id",),
    "reasoning-start": ("id",),
    "reasoning-delta": ("id", "delta"),
    "reasoning-end": ("id",),
    "tool-input-start": ("toolCallId", "toolName"),
    "tool-input-delta": ("toolCallId", "inputTextDelta"),
    "tool-input-available": ("toolCallId", "toolName", "input"),
    "tool-input-error": ("toolCallId", "toolName", "input", "errorText"),
    "tool-approval-request": ("toolCallId", "approvalId"),
    "tool-approval-response": ("approvalId", "approved"),
    "tool-output-available": ("toolCallId", "output"),
    "tool-output-error": ("toolCallId", "errorText"),
    "tool-output-denied": ("toolCallId",),
    "source-url": ("sourceId", "url"),
    "source-document": ("sourceId", "mediaType", "title"),
    "file": ("url", "mediaType"),
    "reasoning-file": ("url", "mediaType"),
    "custom": ("kind",),
    "steering-message": ("id", "parts"),
}
_ANY_VALUE = {"input", "output", "data", "messageMetadata", "approved", "parts"}  # fields that need not be texts

# The first major version that knows a type. The others are as old as version 5.
_SINCE = {
    "tool-approval-request": 6,
    "tool-output-denied": 6,
    "tool-approval-response": 7,
    "custom": 7,
    "reasoning-file": 7,
    "reset-step": 7,
    "steering-message": 7,
}
_FINISH_REASONS = {"stop", "length", "content-filter", "tool-calls", "error", "other"}  # of all versions

# Chunks of these types arrive while a text of this module is open, and do not end it.
_BESIDE_TEXT = ("data-", "message-metadata", "source-", "file")

# What most chunks of a stream begin with. They open and close no part.
_DELTAS = ('{"type":"text-delta"', '{"type":"reasoning-delta"', '{"type":"tool-input-delta"')


class Reasoning(NamedTuple):
    """A text of a model's reasoning."""

    text: str


class Frames(NamedTuple):
    """A piece of an encoded event stream."""

    text: str


def reasoning(text: str) -> Reasoning:
    """Return an item for a text of the model's reasoning."""
    return Reasoning(text)


def frames(text: str) -> Frames:
    """Return an item for a piece of an event stream that another library has encoded. It may be split anywhere."""
    return Frames(text)


def step() -> dict[str, Any]:
    """Return an item that ends the step, such as one call of the model, and begins another."""
    return {"type": "start-step"}


def tool_input_start(call_id: str, name: str, *, dynamic: bool = False) -> dict[str, Any]:
    """Return an item for the beginning of a tool call. `dynamic`: the page has no type for the tool."""
    return {"type": "tool-input-start", "toolCallId": call_id, "toolName": name, "dynamic": dynamic or None}


def tool_input_delta(call_id: str, text: str) -> dict[str, Any]:
    """Return an item for a part of the JSON text of a tool's input, after `tool_input_start`."""
    return {"type": "tool-input-delta", "toolCallId": call_id, "inputTextDelta": text}


def tool_input(call_id: str, name: str, input: Any, *, dynamic: bool = False) -> dict[str, Any]:
    """Return an item for a tool call with its complete input."""
    return {
        "type": "tool-input-available",
        "toolCallId": call_id,
        "toolName": name,
        "input": input,
        "dynamic": dynamic or None,
    }


def tool_output(call_id: str, output: Any, *, preliminary: bool = False) -> dict[str, Any]:
    """Return an item for the result of a tool call. `preliminary`: another result will replace it."""
    return {
        "type": "tool-output-available",
        "toolCallId": call_id,
        "output": output,
        "preliminary": preliminary or None,
    }


def tool_error(call_id: str, text: str) -> dict[str, Any]:
    """Return an item for the failure of a tool call."""
    return {"type": "tool-output-error", "toolCallId": call_id, "errorText": text}


def tool_approval(call_id: str, approval_id: str) -> dict[str, Any]:
    """Return an item that asks the user to approve a tool call. Needs version 6."""
    return {"type": "tool-approval-request", "toolCallId": call_id, "approvalId": approval_id}


def source_url(url: str, *, title: str | None = None, id: str | None = None) -> dict[str, Any]:
    """Return an item for a page that the answer refers to. Default id: a new one."""
    return {"type": "source-url", "sourceId": id or new_id(), "url": url, "title": title}


def source_document(
    media_type: str, title: str, *, filename: str | None = None, id: str | None = None
) -> dict[str, Any]:
    """Return an item for a document that the answer refers to. Default id: a new one."""
    return {
        "type": "source-document",
        "sourceId": id or new_id(),
        "mediaType": media_type,
        "title": title,
        "filename": filename,
    }


def file(url: str, media_type: str) -> dict[str, Any]:
    """Return an item for a file that the model has made. The URL may be a data URL."""
    return {"type": "file", "url": url, "mediaType": media_type}


def data(name: str, value: Any, *, id: str | None = None, transient: bool = False) -> dict[str, Any]:
    """Return an item for data of the application, a JSON value.

    Args:
        name: The name: the type of the message part is `data-` and the name.
        value: The data.
        id: A later item with the same name and id replaces the data. Default: None.
        transient: Whether only the page's `onData` gets the data, and the message does not. Default: False.
    """
    return {"type": f"data-{name}", "id": id, "data": value, "transient": transient or None}


def metadata(value: Any) -> dict[str, Any]:
    """Return an item whose value, a JSON object, is merged into the metadata of the message."""
    return {"type": "message-metadata", "messageMetadata": value}


class AiSdkWire:
    """A UI message stream.

    Args:
        message_id: The id of the assistant message. Default: the id of the stream.
        sdk_version: The major version of the clients. Chunks of types that it does not know are left out. Default: 7.
        message: The assistant message that the answer continues. Default: None.
        earlier: The chunks that rebuild `message`, for a client that begins with an empty message. Default: none.
    """

    name: WireName = "ai_sdk"
    headers: Mapping[str, str] = {**EVENT_STREAM, "X-Vercel-Ai-Ui-Message-Stream": "v1"}

    def __init__(
        self,
        message_id: str | None = None,
        sdk_version: SdkVersion = 7,
        message: Mapping[str, Any] | None = None,
        earlier: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._message_id = message_id
        self._sdk_version = sdk_version
        self._message = message
        self._earlier = earlier

    def chunks(self, stream_id: str) -> AiSdkChunks:
        return AiSdkChunks(self._message_id or stream_id, self._sdk_version, self._message)

    def frames(self, stream_id: str, after_seq: int) -> AiSdkFrames:
        return AiSdkFrames(self._earlier)

    def text(self, chunks: Iterable[str]) -> str:
        deltas = (parse_chunk(chunk) for chunk in chunks if '"text-delta"' in chunk)
        return "".join([str(delta["delta"]) for delta in deltas if delta.get("type") == "text-delta"])


class AiSdkChunks:
    """Encodes the items of one answer. The chunks are complete: only their end in another state than done is not."""

    def __init__(self, message_id: str, sdk_version: int, message: Mapping[str, Any] | None = None) -> None:
        self._message_id = message_id
        self._sdk_version = sdk_version
        self._parser = EventParser()
        self._is_started = self._is_finished = self._is_in_step = False
        self._own: tuple[str, str] | None = None  # the kind and the id of the open part of `str` or `Reasoning`
        self._prefix = ""  # of its deltas
        self._parts = 0
        self._open: dict[tuple[str, str], None] = {}  # the kinds and ids of all open parts
        parts = [] if message is None else message.get("parts", [])
        self._calls = {part["toolCallId"] for part in parts if "toolCallId" in part}

    def encode(self, item: Any) -> Sequence[str]:
        if isinstance(item, str):
            return self._own_text("text", item)
        if isinstance(item, Reasoning):
            return self._own_text("reasoning", item.text)
        if isinstance(item, dict):
            return [_dump(chunk) for chunk in self._foreign(item)]
        if isinstance(item, Frames):
            events = self._parser.feed(item.text.encode())
            chunks = [parse_chunk(event.data) for event in events if event.data != "[DONE]"]
            return [_dump(chunk) for each in chunks for chunk in self._foreign(each)]
        raise InvalidDataError(
            f"an item must be a str, a dict, or made by a function of wire.ai_sdk, not {type(item).__name__}"
        )

    def finish(self) -> Sequence[str]:
        chunks: list[dict[str, Any]] = []
        if not self._is_finished:
            chunks = [*self._begin(with_step=not self._is_started), *self._end_parts(), *self._end_step()]
            chunks.append({"type": "finish", "finishReason": "stop"})
        return [_dump(chunk) for chunk in chunks]

    def _own_text(self, kind: str, text: str) -> list[str]:
        if not text:
            return []
        chunks = []
        if self._own is None or self._own[0] != kind:
            self._check_unfinished(kind)
            chunks = [_dump(chunk) for chunk in (*self._begin(), *self._end_own())]
            self._own = (kind, self._new_part_id(kind))
            self._open[self._own] = None
            self._prefix = f'{{"type":"{kind}-delta","id":"{self._own[1]}","delta":'
            chunks.append(_dump({"type": f"{kind}-start", "id": self._own[1]}))
        chunks.append(f"{self._prefix}{json.dumps(text, ensure_ascii=False)}}}")
        return chunks

    def _new_part_id(self, kind: str) -> str:
        while True:
            self._parts += 1
            if (kind, f"{kind}-{self._parts}") not in self._open:
                return f"{kind}-{self._parts}"

    def _foreign(self, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks for a chunk of the source."""
        chunk = _checked(item)
        kind = chunk["type"]
        if kind == "error":
            raise WebError(500, chunk["errorText"])  # the stream ends in state error with this text
        self._check_unfinished(kind)
        if self._sdk_version < _SINCE.get(kind, 5):
            return
        if kind == "start":
            if not self._is_started:
                self._is_started = True
                yield {**chunk, "messageId": self._message_id}
            elif "messageMetadata" in chunk:
                yield metadata(chunk["messageMetadata"])
            return
        if kind in ("finish", "abort"):
            yield from (*self._begin(with_step=not self._is_started), *self._end_parts(), *self._end_step())
            self._is_finished = True
            if chunk.get("finishReason", "other") not in _FINISH_REASONS:
                chunk["finishReason"] = "other"
            yield chunk
            return
        if kind == "start-step":
            yield from (*self._begin(with_step=False), *self._end_own(), *self._end_step())
            self._is_in_step = True
        elif kind == "finish-step":
            yield from self._end_own()
            yield from self._end_step()
            return
        else:
            yield from self._begin(with_step=not kind.startswith(("data-", "message-metadata")))
            if not kind.startswith(_BESIDE_TEXT):
                yield from self._end_own()
            self._follow_part(kind, chunk)
        yield chunk

    def _follow_part(self, kind: str, chunk: Mapping[str, Any]) -> None:
        """Keep track of the open parts and tool calls. Raise `InvalidDataError` for a chunk that belongs to none."""
        part, _, event = kind.rpartition("-")
        if part in ("text", "reasoning") and event in ("start", "delta", "end"):
            if event == "start":
                self._open[part, chunk["id"]] = None
            elif (part, chunk["id"]) not in self._open:
                raise InvalidDataError(f"{kind} of a part {chunk['id']!r} that is not open")
            elif event == "end":
                del self._open[part, chunk["id"]]
        elif kind in ("tool-input-start", "tool-input-available", "tool-input-error"):
            self._calls.add(chunk["toolCallId"])
        elif "toolCallId" in _REQUIRED.get(kind, ()) and chunk["toolCallId"] not in self._calls:
            raise InvalidDataError(f"{kind} of an unknown tool call {chunk['toolCallId']!r}")

    def _begin(self, *, with_step: bool = True) -> Iterator[dict[str, Any]]:
        if not self._is_started:
            self._is_started = True
            yield {"type": "start", "messageId": self._message_id}
        if with_step and not self._is_in_step:
            # Without steps, `sendAutomaticallyWhen` of a page would take the tool results of the last step for new.
            self._is_in_step = True
            yield {"type": "start-step"}

    def _end_own(self) -> Iterator[dict[str, Any]]:
        if self._own is not None:
            kind, part_id = self._own
            self._own = None
            self._open.pop((kind, part_id), None)
            yield {"type": f"{kind}-end", "id": part_id}

    def _end_parts(self) -> Iterator[dict[str, Any]]:
        yield from self._end_own()
        for kind, part_id in self._open:
            yield {"type": f"{kind}-end", "id": part_id}
        self._open.clear()

    def _end_step(self) -> Iterator[dict[str, Any]]:
        if self._is_in_step:
            self._is_in_step = False
            yield {"type": "finish-step"}

    def _check_unfinished(self, kind: str) -> None:
        if self._is_finished:
            raise InvalidDataError(f"{kind} after the end of the answer")


class AiSdkFrames(FrameEncoder):
    """Sends each chunk as one event, and the end as `abort` or `error`, and `[DONE]`."""

    def __init__(self, earlier: Sequence[dict[str, Any]] = ()) -> None:
        self._earlier = earlier
        self._others: list[str] = []  # all chunks except deltas

    def frame(self, seq: int, chunk: str) -> bytes:
        if not chunk.startswith(_DELTAS):
            self._others.append(chunk)
        if self._earlier:
            before = b"".join([_frame(_dump(each)) for each in self._earlier])
            self._earlier = ()
            return before + _frame(chunk)
        return _frame(chunk)

    def end(self, status: StreamStatus | None) -> bytes:
        end = []
        if status is None or status.state != "done":
            end = closing_chunks(map(parse_chunk, self._others))
        if status is None:
            end.append({"type": "error", "errorText": DELETED})
        elif status.state == "error":
            end.append({"type": "error", "errorText": status.error or INTERRUPTED})
        elif status.state == "stopped":
            end.append({"type": "abort"})
        return b"".join([_frame(_dump(chunk)) for chunk in end]) + b"data: [DONE]\n\n"


def closing_chunks(chunks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the chunks that close the open parts of an answer that has ended before its source. Deltas may be missing.

    A client shows an open part as one that is still being written.
    """
    opened: dict[tuple[str, Any], None] = {}
    for chunk in chunks:
        part, _, event = str(chunk.get("type")).rpartition("-")
        if part in ("text", "reasoning"):
            if event == "start":
                opened[part, str(chunk.get("id"))] = None
            elif event == "end":
                opened.pop((part, str(chunk.get("id"))), None)
        elif chunk.get("type") == "reset-step":
            opened.clear()
    return [{"type": f"{part}-end", "id": part_id} for part, part_id in opened]


def parse_chunk(text: str) -> dict[str, Any]:
    """Return the chunk of a JSON text. A text that is not a JSON object gives an empty dict."""
    try:
        chunk = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return chunk if isinstance(chunk, dict) else {}


def _checked(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chunk without optional fields that are None. Raise `InvalidDataError` if a client would reject it."""
    kind = item.get("type")
    if not isinstance(kind, str):
        raise InvalidDataError(f"a chunk needs a type: {str(item)[:100]}")
    required = ("data",) if kind.startswith("data-") and kind != "data-" else _REQUIRED.get(kind)
    if required is None:
        raise InvalidDataError(f"unknown type of a chunk: {kind[:100]!r}")
    for field in required:
        if field not in item:
            raise InvalidDataError(f"a chunk of type {kind} needs the field {field}")
        if field not in _ANY_VALUE and not isinstance(item[field], str):
            raise InvalidDataError(f"the field {field} of a chunk of type {kind} must be a str")
    return {field: value for field, value in item.items() if value is not None or field in required}


def _dump(chunk: Mapping[str, Any]) -> str:
    try:
        return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(f"a chunk of type {chunk['type']} is not JSON: {error}") from None


def _frame(chunk: str) -> bytes:
    if "\n" in chunk or "\r" in chunk:  # JSON of another writer; the client joins the lines again
        return encode(ServerSentEvent(chunk))
    return f"data: {chunk}\n\n".encode()


WIRE = AiSdkWire()
