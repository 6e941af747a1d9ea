"""The encoder of UI message streams: the items of a source become chunks that the clients of the AI SDK accept. Pure.

Follows the readers of npm `ai` 5.0.277, 6.0.326 and 7.0.173. A client rejects the whole answer if it gets a chunk that
its major version does not know, or that belongs to no open part or known tool call. So the encoder refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ._document import MAX_DEPTH, copy_json
from ._encoded_events import EncodedEvents
from ._json import compact_json, parse_object
from ._ui_message_chunks import invalid_field, is_known
from .errors import InvalidDataError

NEWEST_VERSION = 7

# By type of chunk: the required field whose value may have any type, also None.
_VALUE = {
    "tool-input-available": "input",
    "tool-input-error": "input",
    "tool-output-available": "output",
    "message-metadata": "messageMetadata",
}

_FINISH_REASONS = {"stop", "length", "content-filter", "tool-calls", "error", "other"}  # of all versions

# Chunks of these types do not end the part of the preceding `str` or `Reasoning` items.
_KEEPS_TEXT_OPEN = ("data-", "message-metadata", "source-", "file")

MESSAGE_DEPTH = 10  # levels of nesting that a stored message adds around a value of a chunk, at most

# Ignored after the end of an answer.
_IGNORED_AFTER_END = ("start", "finish-step", "finish", "abort")


class SourceError(Exception):
    """The source has sent an error chunk. It counts as an exception of the source with this text."""


class Reasoning(NamedTuple):
    """A text of a model's reasoning."""

    text: str


class Encoded(NamedTuple):
    """A piece of an encoded event stream."""

    text: str


class UiChunkEncoder:
    """Encodes the items of one answer. Without `finish`, `AiSdkFrameEncoder` closes the open parts for each client."""

    def __init__(self, message_id: str, sdk_version: int, message: Mapping[str, Any] | None = None) -> None:
        self._message_id = message_id
        self._sdk_version = sdk_version
        self._encoded = EncodedEvents()
        self._is_started = self._is_finished = self._is_in_step = False
        self._text_part: tuple[str, str] | None = None  # the kind and the id of the open part of `str` or `Reasoning`
        self._prefix = ""  # of its deltas
        self._parts = 0
        self._open: dict[tuple[str, str], None] = {}  # the kinds and ids of all open parts
        parts = [] if message is None else message.get("parts", [])
        known = [part for part in parts if isinstance(part, Mapping)]
        self._calls = {call for part in known if isinstance(call := part.get("toolCallId"), str)}
        self._streamed: set[str] = set()  # the calls whose input arrives in deltas
        self._step_calls: set[str] = set()  # the calls of this step
        self._approvals: dict[str, str] = {}  # the calls by the ids of their approvals
        for part in known:
            approval = part.get("approval")
            if isinstance(approval, Mapping) and isinstance(approval.get("id"), str):
                self._approvals[approval["id"]] = str(part.get("toolCallId"))

    def encode(self, item: Any) -> Sequence[str]:
        if isinstance(item, str):
            return self._text_chunks("text", item)
        if isinstance(item, Reasoning):
            return self._text_chunks("reasoning", item.text)
        if isinstance(item, dict):
            return [dump_chunk(chunk) for chunk in self._source_chunks(item)]
        if isinstance(item, Encoded):
            return [dump_chunk(chunk) for chunk in self._event_chunks(self._encoded.feed(item.text))]
        raise InvalidDataError(
            f"an item must be a str, a dict, or made by a function of wire.ai_sdk, not {type(item).__name__}"
        )

    def finish(self) -> Sequence[str]:
        chunks = [*self._event_chunks(self._encoded.finish())]
        if not self._is_finished:
            chunks += [*self._begin(with_step=not self._is_started), *self._end_parts(), *self._end_step()]
            chunks.append({"type": "finish", "finishReason": "stop"})
        return [dump_chunk(chunk) for chunk in chunks]

    def _event_chunks(self, events: Sequence[str]) -> Iterator[dict[str, Any]]:
        for data in events:
            if data != "[DONE]":
                yield from self._source_chunks(parse_object(data))

    def _text_chunks(self, kind: str, text: str) -> list[str]:
        if not text:
            return []
        chunks = []
        if self._text_part is None or self._text_part[0] != kind:
            self._check_unfinished(kind)
            chunks = [dump_chunk(chunk) for chunk in (*self._begin(), *self._end_text_part())]
            self._text_part = (kind, self._new_part_id(kind))
            self._open[self._text_part] = None
            self._prefix = f'{{"type":"{kind}-delta","id":"{self._text_part[1]}","delta":'
            chunks.append(dump_chunk({"type": f"{kind}-start", "id": self._text_part[1]}))
        chunks.append(f"{self._prefix}{compact_json(text)}}}")
        return chunks

    def _new_part_id(self, kind: str) -> str:
        while True:
            self._parts += 1
            if (kind, f"{kind}-{self._parts}") not in self._open:
                return f"{kind}-{self._parts}"

    def _source_chunks(self, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks for a chunk of the source."""
        chunk = _checked(item)
        kind = chunk["type"]
        if kind == "error":
            raise SourceError(chunk["errorText"])
        if self._is_finished and kind in _IGNORED_AFTER_END:  # pydantic-ai ends the step of an aborted run
            return
        self._check_unfinished(kind)
        if not is_known(kind, self._sdk_version):
            return
        if kind == "start":
            if not self._is_started:
                self._is_started = True
                yield {**chunk, "messageId": self._message_id}
            elif "messageMetadata" in chunk:
                yield {"type": "message-metadata", "messageMetadata": chunk["messageMetadata"]}
            return
        if kind in ("finish", "abort"):
            yield from (*self._begin(with_step=not self._is_started), *self._end_parts(), *self._end_step())
            self._is_finished = True
            reasons = _FINISH_REASONS | ({"interrupted"} if self._sdk_version >= 7 else set())
            if chunk.get("finishReason", "other") not in reasons:
                chunk["finishReason"] = "other"
            yield chunk
            return
        if kind == "start-step":
            yield from (*self._begin(with_step=False), *self._end_text_part(), *self._end_step())
            self._is_in_step = True
        elif kind == "finish-step":
            yield from self._end_text_part()
            yield from self._end_step()
            return
        else:
            yield from self._begin(with_step=not kind.startswith(("data-", "message-metadata")))
            if kind == "reset-step":
                self._text_part = None
            elif not kind.startswith(_KEEPS_TEXT_OPEN):
                yield from self._end_text_part()
            self._track_part(kind, chunk)
        yield chunk

    def _track_part(self, kind: str, chunk: Mapping[str, Any]) -> None:
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
            self._step_calls.add(chunk["toolCallId"])
            if kind == "tool-input-start":
                self._streamed.add(chunk["toolCallId"])
        elif kind == "tool-input-delta":
            self._check_call(kind, chunk["toolCallId"], self._streamed)
        elif kind == "tool-approval-response":
            self._check_call(kind, self._approvals.get(chunk["approvalId"], ""), self._calls)
        elif kind.startswith(("tool-output-", "tool-approval-")):
            self._check_call(kind, chunk["toolCallId"], self._calls)
            if kind == "tool-approval-request":
                self._approvals[chunk["approvalId"]] = chunk["toolCallId"]
        elif kind == "reset-step":  # the client drops the parts of the step
            self._open.clear()
            self._calls -= self._step_calls
            self._streamed -= self._step_calls

    def _check_call(self, kind: str, call_id: str, calls: set[str]) -> None:
        if call_id not in calls:
            raise InvalidDataError(f"{kind} of an unknown tool call {call_id!r}")

    def _begin(self, *, with_step: bool = True) -> Iterator[dict[str, Any]]:
        if not self._is_started:
            self._is_started = True
            yield {"type": "start", "messageId": self._message_id}
        if with_step and not self._is_in_step:
            # Without steps, `sendAutomaticallyWhen` of a page would take the tool results of the last step for new.
            self._is_in_step = True
            yield {"type": "start-step"}

    def _end_text_part(self) -> Iterator[dict[str, Any]]:
        if self._text_part is not None:
            kind, part_id = self._text_part
            self._text_part = None
            self._open.pop((kind, part_id), None)
            yield {"type": f"{kind}-end", "id": part_id}

    def _end_parts(self) -> Iterator[dict[str, Any]]:
        yield from self._end_text_part()
        for kind, part_id in self._open:
            yield {"type": f"{kind}-end", "id": part_id}
        self._open.clear()

    def _end_step(self) -> Iterator[dict[str, Any]]:
        if self._is_in_step:
            if self._sdk_version < 7:  # these clients close all parts at the end of a step
                yield from self._end_parts()
            self._is_in_step = False
            self._step_calls.clear()
            yield {"type": "finish-step"}

    def _check_unfinished(self, kind: str) -> None:
        if self._is_finished:
            raise InvalidDataError(f"{kind} after the end of the answer")


def _checked(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chunk without optional fields that are None. Raise `InvalidDataError` if a client would reject it."""
    kind = item.get("type")
    if not isinstance(kind, str):
        raise InvalidDataError(f"a chunk needs a type: {str(item)[:100]}")
    if not is_known(kind, NEWEST_VERSION):
        raise InvalidDataError(f"unknown type of a chunk: {kind[:100]!r}")
    value = "data" if kind.startswith("data-") else _VALUE.get(kind)
    chunk = {field: each for field, each in item.items() if each is not None or field == value}
    invalid = value if value is not None and value not in chunk else invalid_field(chunk)
    if invalid is not None:
        raise InvalidDataError(f"the field {invalid} of a chunk of type {kind} is missing, or has a wrong type")
    if not kind.endswith("-delta"):
        # In the stored message, the value is a few levels deeper.
        copy_json(chunk, MAX_DEPTH - MESSAGE_DEPTH)
    return chunk


def dump_chunk(chunk: Mapping[str, Any]) -> str:
    try:
        return compact_json(chunk)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(f"a chunk of type {chunk['type']} is not JSON: {error}") from None
