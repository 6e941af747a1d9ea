"""Assemble the UIMessage that a client of the AI SDK builds from the chunks of an answer. Pure.

The rules are those of `readUIMessageStream` in the npm package `ai` 5.0.277, 6.0.326 and 7.0.173. They differ between
the major versions, so that a stored message equals the one on the user's screen only if the version is the client's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._ui_message_chunks import PART_FIELDS, is_known, is_valid, well_formed_parts
from ._ui_message_tools import HANDLERS as CALL_HANDLERS
from ._ui_message_tools import Text, ToolCalls, UnreadableError, given, is_call

Chunk = dict[str, Any]
Part = dict[str, Any]


def assemble(
    chunks: Iterable[Chunk], message: dict[str, Any] | None = None, *, message_id: str = "", sdk_version: int = 7
) -> dict[str, Any]:
    """Return the UIMessage that a client builds from UI message chunks.

    It never raises for the contents of chunks or of `message`. It ends where the client stops reading: before a chunk
    that is malformed, that adds to a part that was not started, or that belongs to an unknown tool call, and at an
    `error` chunk. Chunks of types that the major version does not know are ignored. Fields that are None count as
    missing, except for `input`, `output` and `data`.

    Args:
        chunks: The chunks, as parsed from JSON.
        message: The assistant message that the chunks continue. It is not changed. Other messages are ignored.
            Default: a new message. A `start` chunk with another `messageId` begins a new message, too.
        message_id: The id of a new message, unless a `start` chunk has one. Default: an empty id.
        sdk_version: The major version of the client's `ai` package: 5, 6 or 7. Default: 7.
    """
    assembly = _Assembly(message, message_id, sdk_version)
    for chunk in chunks:
        if not assembly.add(chunk):
            break
    return assembly.finish()


class _Assembly:
    def __init__(self, message: dict[str, Any] | None, message_id: str, sdk_version: int) -> None:
        self._version = sdk_version
        is_continued = isinstance(message, dict) and message.get("role") == "assistant"
        self._begin(message if message and is_continued else {"id": message_id, "role": "assistant"})

    def _begin(self, message: dict[str, Any]) -> None:
        self._parts: list[Part] = []
        self._message = {**message, "parts": self._parts}
        self._texts: list[tuple[Part, Text]] = []
        self._open: dict[tuple[str, str], tuple[Part, Text]] = {}  # by kind and id
        self._calls = ToolCalls(self._parts, self._version)
        self._data: dict[tuple[str, str], Part] = {}  # the first part of each type and id
        self._step_start = 0  # the index of the first part of the current step
        for part in well_formed_parts(message):
            self._push(dict(part))
        self._calls.continue_inputs()

    def add(self, chunk: Chunk) -> bool:
        """Apply a chunk. Return whether the client reads on."""
        type = chunk.get("type") if isinstance(chunk, dict) else None
        if not isinstance(type, str):
            return False
        if not is_known(type, self._version):
            return True
        if not is_valid(chunk):
            return False
        try:
            if call_handler := CALL_HANDLERS.get(type):
                call_handler(self._calls, chunk)
            elif handler := _HANDLERS.get("data-" if type.startswith("data-") else type):
                handler(self, chunk)
        except UnreadableError:
            return False
        return type != "error"

    def finish(self) -> dict[str, Any]:
        """Return the message. Nothing can be added afterwards."""
        for part, text in self._texts:
            part["text"] = text.join()
        self._calls.finish()
        return self._message

    # Parts

    def _push(self, part: Part) -> None:
        if is_call(part):
            self._calls.add(part)
            return
        self._parts.append(part)
        if part["type"] == "step-start":
            self._step_start = len(self._parts)
            self._calls.begin_step()
        elif (key := _data_key(part)) is not None:
            self._data.setdefault(key, part)

    def _on_start_step(self, chunk: Chunk) -> None:
        self._push({"type": "step-start"})

    def _on_finish_step(self, chunk: Chunk) -> None:
        if self._version < 7:
            self._open.clear()

    def _on_reset_step(self, chunk: Chunk) -> None:
        self._open.clear()
        removed = self._parts[self._step_start :]
        del self._parts[self._step_start :]
        self._calls.reset_step(removed)
        for part in removed:
            key = _data_key(part)
            if key is not None and self._data.get(key) is part:
                del self._data[key]

    def _on_text_start(self, chunk: Chunk) -> None:
        kind = chunk["type"].removesuffix("-start")
        part = {"type": kind, "text": "", "state": "streaming", **given(chunk, "providerMetadata")}
        if kind == "reasoning":
            part["id"] = chunk["id"]
        self._push(part)
        text = Text()
        self._texts.append((part, text))
        self._open[kind, chunk["id"]] = part, text

    def _on_text_delta(self, chunk: Chunk) -> None:
        opened = self._open.get((chunk["type"].removesuffix("-delta"), chunk["id"]))
        if opened is None:
            raise UnreadableError
        part, text = opened
        text.pieces.append(chunk["delta"])
        if chunk.get("providerMetadata") is not None:
            part["providerMetadata"] = chunk["providerMetadata"]

    def _on_text_end(self, chunk: Chunk) -> None:
        kind = chunk["type"].removesuffix("-end")
        opened = self._open.pop((kind, chunk["id"]), None)
        if opened is None:
            raise UnreadableError
        part, _ = opened
        part["state"] = "done"
        part.update(given(chunk, "providerMetadata"))
        if kind == "text" and self._version >= 7:
            part.update(given(chunk, "citations"))

    def _on_part(self, chunk: Chunk) -> None:
        part = {"type": chunk["type"], **given(chunk, *PART_FIELDS[chunk["type"]])}
        if self._version == 5 and part["type"] == "file":
            part.pop("providerMetadata", None)
        self._push(part)

    def _on_data(self, chunk: Chunk) -> None:
        if chunk.get("transient"):
            return
        key = _data_key(chunk)
        part = self._data.get(key) if key is not None else None
        if part is None:
            self._push({name: value for name, value in chunk.items() if value is not None or name == "data"})
        elif "data" in chunk:
            part["data"] = chunk["data"]
        else:
            part.pop("data", None)

    # The message

    def _on_start(self, chunk: Chunk) -> None:
        id = chunk.get("messageId")
        if id is not None and id != self._message.get("id"):
            self._begin({"id": id, "role": "assistant"})
        self._on_metadata(chunk)

    def _on_metadata(self, chunk: Chunk) -> None:
        new = chunk.get("messageMetadata")
        if new is not None:
            self._message["metadata"] = _merge(self._message.get("metadata"), new)


_HANDLERS = {
    "start": _Assembly._on_start,
    "start-step": _Assembly._on_start_step,
    "finish-step": _Assembly._on_finish_step,
    "reset-step": _Assembly._on_reset_step,
    "finish": _Assembly._on_metadata,
    "message-metadata": _Assembly._on_metadata,
    "text-start": _Assembly._on_text_start,
    "text-delta": _Assembly._on_text_delta,
    "text-end": _Assembly._on_text_end,
    "reasoning-start": _Assembly._on_text_start,
    "reasoning-delta": _Assembly._on_text_delta,
    "reasoning-end": _Assembly._on_text_end,
    "data-": _Assembly._on_data,
    **dict.fromkeys(PART_FIELDS, _Assembly._on_part),
}


def _data_key(part: Part) -> tuple[str, str] | None:
    """Return the type and id of a data part that other chunks can replace, else None."""
    type, id = part["type"], part.get("id")
    return (type, id) if type.startswith("data-") and isinstance(id, str) else None


def _merge(base: Any, overrides: Any) -> Any:
    """Merge metadata. Objects are merged deeply; other values, lists included, are replaced."""
    if not isinstance(base, dict) or not isinstance(overrides, dict):
        return overrides
    merged = dict(base)
    pending = [(merged, overrides)]  # no recursion, since metadata may be nested deeply
    while pending:
        target, source = pending.pop()
        for key, value in source.items():
            if key in ("__proto__", "constructor", "prototype"):  # the client ignores these
                continue
            old = target.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                target[key] = dict(old)
                pending.append((target[key], value))
            else:
                target[key] = value
    return merged
