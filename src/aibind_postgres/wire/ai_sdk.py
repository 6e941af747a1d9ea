"""The wire format of the AI SDK: UI message streams, for `useChat` and other clients of `ai` 5, 6 and 7. Pure.

The items of a source are:

- `str`: text of the model. The encoder opens and closes the text part.
- `reasoning(text)`: the same for reasoning.
- A `dict`: one chunk, such as the other functions of this module return. Optional fields that are None are left out.
- `encoded(text)`: chunks that another library has encoded as an event stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .._json import parse_object
from .._ui_encoder import Encoded, Reasoning, UiChunkEncoder, dump_chunk
from ..history import new_id
from ..models import StreamStatus
from ..sse import ServerSentEvent, encode
from . import DELETED, EVENT_STREAM, INTERRUPTED, FrameEncoder, WireName

__all__ = [
    "WIRE",
    "AiSdkWire",
    "Encoded",
    "OpenParts",
    "Reasoning",
    "SdkVersion",
    "data",
    "encoded",
    "file",
    "metadata",
    "reasoning",
    "source_document",
    "source_url",
    "step",
    "tool_approval",
    "tool_error",
    "tool_input",
    "tool_input_delta",
    "tool_input_start",
    "tool_output",
]

SdkVersion = Literal[5, 6, 7]

# The beginnings of most chunks. Chunks with these types neither open nor close a part.
_DELTAS = ('{"type":"text-delta"', '{"type":"reasoning-delta"', '{"type":"tool-input-delta"')
_CHANGES = ('"text-start"', '"text-end"', '"reasoning-start"', '"reasoning-end"', '"reset-step"')


def reasoning(text: str) -> Reasoning:
    """Return an item for a text of the model's reasoning."""
    return Reasoning(text)


def encoded(text: str) -> Encoded:
    """Return an item for a piece of an event stream that another library has encoded. It may be split anywhere."""
    return Encoded(text)


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
    """Return an item that asks the user to approve a tool call. Clients of version 5 do not get it."""
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

    def chunk_encoder(self, stream_id: str) -> UiChunkEncoder:
        return UiChunkEncoder(self._message_id or stream_id, self._sdk_version, self._message)

    def frame_encoder(self, stream_id: str, after_seq: int) -> AiSdkFrameEncoder:
        return AiSdkFrameEncoder(self._earlier)

    def text(self, chunks: Iterable[str]) -> str:
        deltas = (parse_object(chunk) for chunk in chunks if '"text-delta"' in chunk)
        return "".join([str(delta["delta"]) for delta in deltas if delta.get("type") == "text-delta"])


class AiSdkFrameEncoder(FrameEncoder):
    """Sends each chunk as one event, and the end as `abort` or `error`, and `[DONE]`."""

    def __init__(self, earlier: Sequence[dict[str, Any]] = ()) -> None:
        self._earlier = earlier
        self._is_empty = True
        self._parts = OpenParts()

    def frame(self, seq: int, chunk: str) -> bytes:
        self._is_empty = False
        self._parts.apply(chunk)
        if self._earlier:
            before = b"".join([_frame(dump_chunk(each)) for each in self._earlier])
            self._earlier = ()
            return before + _frame(chunk)
        return _frame(chunk)

    def end(self, status: StreamStatus | None) -> bytes:
        end = []
        if status is None:
            if not self._is_empty:  # otherwise, the stream of a request that was refused
                end = [{"type": "error", "errorText": DELETED}]
        elif status.state == "error":
            end = [{"type": "error", "errorText": status.error or INTERRUPTED}]
        elif status.state == "stopped":
            end = [{"type": "abort"}]
        if end:
            end = [*self._parts.closing_chunks(), *end]
        return b"".join([_frame(dump_chunk(chunk)) for chunk in end]) + b"data: [DONE]\n\n"


class OpenParts:
    """The texts and reasoning that are open after some chunks of an answer.

    A client shows an open part as one that is still being written.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], None] = {}

    def apply(self, text: str) -> None:
        """Update the state by the next chunk. Only one that may open or close a part is parsed."""
        if text.startswith(_DELTAS) or not any(kind in text for kind in _CHANGES):
            return
        chunk = parse_object(text)
        part, _, event = str(chunk.get("type")).rpartition("-")
        if part in ("text", "reasoning"):
            if event == "start":
                self._open[part, str(chunk.get("id"))] = None
            elif event == "end":
                self._open.pop((part, str(chunk.get("id"))), None)
        elif chunk.get("type") == "reset-step":
            self._open.clear()

    def closing_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks that close the open parts."""
        return [{"type": f"{part}-end", "id": part_id} for part, part_id in self._open]


def _frame(chunk: str) -> bytes:
    if "\n" in chunk or "\r" in chunk:  # JSON of another writer; the client joins the lines again
        return encode(ServerSentEvent(chunk))
    return f"data: {chunk}\n\n".encode()


WIRE = AiSdkWire()
