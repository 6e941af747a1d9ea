"""The UI message chunks of the AI SDK: their fields, and the chunks that rebuild a UIMessage. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Chunk = dict[str, Any]

_STRINGS = (
    "approvalId delta errorText filename id inputEncoding inputTextDelta kind mediaType messageId reason signature"
    " sourceId title toolCallId toolName url"
)
_FLAGS = "approved dynamic isAutomatic preliminary providerExecuted transient"
_TYPES: dict[str, type] = {
    **dict.fromkeys(_STRINGS.split(), str),
    **dict.fromkeys(_FLAGS.split(), bool),
    **dict.fromkeys(("providerMetadata", "toolMetadata"), dict),
    **dict.fromkeys(("citations", "parts"), list),
}

_CALL = "toolCallId toolName | providerExecuted providerMetadata toolMetadata dynamic title"
_RESULT = "| providerExecuted providerMetadata toolMetadata dynamic"

# The fields of each type of chunk, required ones first. Fields of any type are left out.
_FIELDS = {
    "start": "| messageId",
    "start-step": "",
    "finish-step": "",
    "reset-step": "",
    "finish": "",
    "abort": "",
    "message-metadata": "",
    "error": "errorText",
    "text-start": "id | providerMetadata",
    "text-delta": "id delta | providerMetadata",
    "text-end": "id | providerMetadata citations",
    "reasoning-start": "id | providerMetadata",
    "reasoning-delta": "id delta | providerMetadata",
    "reasoning-end": "id | providerMetadata",
    "custom": "kind | providerMetadata",
    "file": "url mediaType | providerMetadata",
    "reasoning-file": "url mediaType | providerMetadata",
    "source-url": "sourceId url | title providerMetadata",
    "source-document": "sourceId mediaType title | filename providerMetadata",
    "steering-message": "id parts",
    "tool-input-start": _CALL + " inputEncoding",
    "tool-input-delta": "toolCallId inputTextDelta",
    "tool-input-available": _CALL,
    "tool-input-error": "errorText " + _CALL,
    "tool-approval-request": "toolCallId approvalId | reason isAutomatic signature",
    "tool-approval-response": "approvalId approved | reason providerExecuted providerMetadata",
    "tool-output-available": "toolCallId " + _RESULT + " preliminary",
    "tool-output-error": "toolCallId errorText " + _RESULT,
    "tool-output-denied": "toolCallId",
    "data-": "| id transient",
}


def _parse_fields(fields: str) -> list[tuple[str, type, bool]]:
    required, _, optional = fields.partition("|")
    return [(name, _TYPES[name], True) for name in required.split()] + [
        (name, _TYPES[name], False) for name in optional.split()
    ]


_PARSED_FIELDS = {type: _parse_fields(fields) for type, fields in _FIELDS.items()}
_DATA_FIELDS = _PARSED_FIELDS.pop("data-")

# The parts that have the fields of their chunks.
PART_FIELDS = {
    type: [name for name, *_ in _PARSED_FIELDS[type]]
    for type in ("file", "source-url", "source-document", "custom", "reasoning-file", "steering-message")
}

# The major version that brought a type. 5 had all others.
_SINCE = {
    "tool-approval-request": 6,
    "tool-output-denied": 6,
    **dict.fromkeys(("tool-approval-response", "custom", "reasoning-file", "reset-step", "steering-message"), 7),
}


def is_known(type: str, sdk_version: int) -> bool:
    """Return whether a major version can add chunks of a type to a message."""
    return type.startswith("data-") or (type in _PARSED_FIELDS and _SINCE.get(type, 5) <= sdk_version)


def is_valid(chunk: Chunk) -> bool:
    """Return whether the fields of a chunk have the types that the reader relies on. None counts as missing."""
    return invalid_field(chunk) is None


def invalid_field(chunk: Chunk) -> str | None:
    """Return the name of a field that is missing, or has a type that the reader does not expect. None if all are valid.

    A field with the value None counts as missing.
    """
    fields = _DATA_FIELDS if chunk["type"].startswith("data-") else _PARSED_FIELDS[chunk["type"]]
    for name, type, required in fields:
        value = chunk.get(name)
        if required if value is None else not isinstance(value, type):
            return name
    return None


def message_chunks(message: dict[str, Any], sdk_version: int = 7) -> list[Chunk]:
    """Return the chunks from which a client rebuilds a UIMessage, from `start` on and without `finish`.

    They come before the chunks of a stream that continues the message, if a client reads the stream from its beginning.
    They rebuild each message that a client has built from the chunks of a regular answer: the calls have an input, then
    perhaps an approval, then perhaps a result. Other states may have no chunks in the major version. They are left out,
    or replaced by the closest state:

    - Before 7, no chunk has the user's response to an approval. A call with a response loses its approval, and in state
      `approval-responded` it becomes `input-available`. The client would else ask the user again.
    - 5 has no approvals: calls in state `approval-requested` or `output-denied` become `input-available`.
    - Before 7 there are no `custom`, `reasoning-file` and `steering-message` parts. They are left out.
    - A text without a state becomes `done`. `filename` of a file, and other fields that no chunk has, are left out.
    - The input of a call in state `input-streaming` is sent as JSON if its text is missing.
    - A part that the client could not have built, such as a tool call without an id, is left out.

    A call with a result is rebuilt without `tool-input-available`, so that the client does not run it again.

    Args:
        message: The UIMessage. It may be malformed.
        sdk_version: The major version of the client's `ai` package: 5, 6 or 7. Default: 7.
    """
    message = message if isinstance(message, dict) else {}
    start: Chunk = {"type": "start"}
    if isinstance(message.get("id"), str):
        start["messageId"] = message["id"]
    if message.get("metadata") is not None:
        start["messageMetadata"] = message["metadata"]
    chunks = [start]
    in_step = False
    for number, part in enumerate(well_formed_parts(message)):
        if part["type"] == "step-start":
            chunks += [{"type": "finish-step"}, {"type": "start-step"}] if in_step else [{"type": "start-step"}]
            in_step = True
            continue
        # An id that no stream uses: the stream that follows must not add to a text of this message.
        try:
            group = [_without_none(chunk) for chunk in _part_chunks(part, f"restored-{number}", sdk_version)]
        except RecursionError:  # an input that is nested too deeply for JSON
            continue
        if all(map(is_valid, group)):
            chunks += group
    if in_step:
        chunks.append({"type": "finish-step"})
    return chunks


def well_formed_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message. Values that are no parts are left out."""
    parts = message.get("parts")
    if not isinstance(parts, list):
        return []
    return [part for part in parts if isinstance(part, dict) and isinstance(part.get("type"), str)]


def _without_none(chunk: Chunk) -> Chunk:
    # None is a value of some fields, and stands for a missing field elsewhere.
    return {name: value for name, value in chunk.items() if value is not None or name not in _TYPES}


def _part_chunks(part: dict[str, Any], id: str, sdk_version: int) -> Iterator[Chunk]:
    type = part["type"]
    if type in ("text", "reasoning"):
        id = part.get("id") or id if type == "reasoning" else id
        yield {"type": f"{type}-start", "id": id, "providerMetadata": part.get("providerMetadata")}
        if part.get("text") != "":
            yield {"type": f"{type}-delta", "id": id, "delta": part.get("text")}
        if part.get("state") != "streaming":
            citations = part.get("citations") if sdk_version >= 7 and type == "text" else None
            yield {"type": f"{type}-end", "id": id, "citations": citations}
    elif type.startswith("tool-") or type == "dynamic-tool":
        yield from _call_chunks(part, sdk_version)
    elif type.startswith("data-"):
        if not part.get("transient"):
            yield part
    elif type in PART_FIELDS and is_known(type, sdk_version):
        yield {"type": type, **{name: part.get(name) for name in PART_FIELDS[type]}}


def _call_chunks(part: dict[str, Any], sdk_version: int) -> Iterator[Chunk]:
    """Yield the chunks of a tool call, in the order in which a client builds its part: input, approval, result."""
    state = part.get("state")
    is_dynamic = part["type"] == "dynamic-tool"
    call = {"toolCallId": part.get("toolCallId"), "dynamic": True if is_dynamic else None}
    named_call = {
        **call,
        "toolName": part.get("toolName") if is_dynamic else part["type"].removeprefix("tool-"),
        "providerExecuted": part.get("providerExecuted"),
        "providerMetadata": part.get("callProviderMetadata"),
        "title": part.get("title"),
        "toolMetadata": part.get("toolMetadata"),
    }
    raw = part.get("rawInput")
    # Before 7, the reader stores an invalid input as `rawInput`.
    is_input_error = state == "output-error" and "rawInput" in part and "input" not in part and sdk_version < 7
    has_result = state in ("output-available", "output-error")
    keeps_raw = isinstance(raw, str) and state != "output-available" and not is_input_error

    # `tool-input-available` would let the client's `onToolCall` run a call with a result again.
    if keeps_raw or has_result or "input" not in part or "inputEncoding" in part or state == "input-streaming":
        if sdk_version == 5 and named_call["providerMetadata"] is not None:
            # The only other chunk of 5 that sets the metadata of a call.
            yield {"type": "tool-input-error", **named_call, "input": None, "errorText": ""}
        encoding = part.get("inputEncoding")
        if keeps_raw and part.get("input") == raw:
            encoding = "text"
        yield {"type": "tool-input-start", **named_call, "inputEncoding": encoding}
        if keeps_raw or "input" in part:
            text = raw if keeps_raw else json.dumps(part["input"], ensure_ascii=False)
            yield {"type": "tool-input-delta", "toolCallId": call["toolCallId"], "inputTextDelta": text}
    else:
        yield {"type": "tool-input-available", **named_call, "input": part["input"]}

    approval = list(_approval_chunks(part, sdk_version))
    is_pending = state in ("approval-requested", "approval-responded")
    if has_result or state == "output-denied":
        yield from approval
    result = {**call, "providerMetadata": part.get("resultProviderMetadata")}
    error = {**result, "errorText": part.get("errorText")}
    if is_input_error:
        yield {"type": "tool-input-error", **error, "input": raw, "toolName": named_call["toolName"]}
    elif state == "output-error":
        if not keeps_raw:  # an output removes the `rawInput` that the delta has left
            yield {"type": "tool-output-available", **call, "output": None, "preliminary": True}
        yield {"type": "tool-output-error", **error}
    elif state == "output-available":
        preliminary = part.get("preliminary")
        yield {"type": "tool-output-available", **result, "output": part.get("output"), "preliminary": preliminary}
    if is_pending:
        yield from approval
    elif state == "output-denied" and sdk_version >= 6:
        yield {"type": "tool-output-denied", "toolCallId": call["toolCallId"]}


def _approval_chunks(part: dict[str, Any], sdk_version: int) -> Iterator[Chunk]:
    approval = part.get("approval")
    if not isinstance(approval, dict) or sdk_version < 6:
        return
    id = approval.get("id")
    has_response = isinstance(approval.get("approved"), bool)
    if not isinstance(id, str) or (has_response and sdk_version < 7):
        return
    request = {
        "type": "tool-approval-request",
        "toolCallId": part.get("toolCallId"),
        "approvalId": id,
        "reason": approval.get("requestReason"),
        "isAutomatic": approval.get("isAutomatic"),
        "signature": approval.get("signature"),
    }
    names = {"descriptor": "approvalDescriptor", "inputSchemaInput": "inputSchemaInput"}
    yield request | {names[name]: approval[name] for name in names if name in approval}
    if has_response:
        approved, reason = approval["approved"], approval.get("reason")
        yield {"type": "tool-approval-response", "approvalId": id, "approved": approved, "reason": reason}
