"""Streams of UI message chunks: recorded ones with every chunk type, random valid ones, and chunks in any order."""

from __future__ import annotations

import json
import random
from typing import Any

from aibind_postgres._ui_message import _Assembly

Chunk = dict[str, Any]

METADATA = {"openai": {"itemId": "m-1"}}


def _recorded(sdk_version: int) -> list[list[Chunk]]:
    since_6, since_7 = sdk_version >= 6, sdk_version >= 7
    step, end = {"type": "start-step"}, {"type": "finish-step"}
    start = {"type": "start", "messageId": "msg-1", "messageMetadata": {"usage": {"input": 3}, "model": "m"}}
    finish = {"type": "finish", "finishReason": "stop", "messageMetadata": {"usage": {"output": 4}, "tags": [1]}}
    text = [
        {"type": "reasoning-start", "id": "r", "providerMetadata": METADATA},
        {"type": "reasoning-delta", "id": "r", "delta": "Hm"},
        {"type": "reasoning-delta", "id": "r", "delta": "m \N{GRINNING FACE}"},
        {"type": "reasoning-end", "id": "r"},
        {"type": "text-start", "id": "t"},
        {"type": "text-delta", "id": "t", "delta": "Hello \ud83d"},
        {"type": "text-delta", "id": "t", "delta": "\ude00", "providerMetadata": METADATA},
        {"type": "text-end", "id": "t", **({"citations": []} if since_7 else {})},
    ]
    parts: list[Chunk] = [
        {"type": "source-url", "sourceId": "s", "url": "https://example.org/", "title": "Example"},
        {"type": "source-document", "sourceId": "d", "mediaType": "text/plain", "title": "T", "filename": "t.txt"},
        {"type": "file", "url": "https://example.org/a.png", "mediaType": "image/png", "providerMetadata": METADATA},
        {"type": "data-weather", "id": "w", "data": {"state": "loading"}},
        {"type": "data-weather", "id": "w", "data": {"state": "done"}},
        {"type": "data-weather", "data": None},
        {"type": "data-progress", "data": 1, "transient": True},
        {"type": "message-metadata", "messageMetadata": {"usage": {"total": 7}, "constructor": 1}},
    ]
    calls: list[Chunk] = []
    for call_id, dynamic in (("a", {}), ("b", {"dynamic": True})):
        name = {"toolCallId": call_id, "toolName": "find-it", **dynamic}
        calls += [
            {"type": "tool-input-start", **name, "providerExecuted": True, "title": "Find", "toolMetadata": {"x": 1}},
            {"type": "tool-input-delta", "toolCallId": call_id, "inputTextDelta": '{"query": "a\\u00'},
            {"type": "tool-input-delta", "toolCallId": call_id, "inputTextDelta": 'e9", "n": [1, tr'},
            {"type": "tool-input-available", **name, "input": {"query": "é"}, "providerMetadata": METADATA},
            {"type": "tool-output-available", "toolCallId": call_id, "output": 1, "preliminary": True, **dynamic},
            {"type": "tool-output-available", "toolCallId": call_id, "output": {"n": 2}, **dynamic},
        ]
        failing = {"toolCallId": call_id + "2", "toolName": "fail", **dynamic}
        calls += [
            {"type": "tool-input-available", **failing, "input": [1]},
            {"type": "tool-output-error", "toolCallId": call_id + "2", "errorText": "no", **dynamic},
            {"type": "tool-input-error", **failing, "toolCallId": call_id + "3", "input": "x", "errorText": "bad"},
        ]
    approvals: list[Chunk] = []
    if since_6:
        for call_id in ("p", "q", "r"):
            request = {"toolCallId": call_id, "approvalId": "approve-" + call_id, "signature": "s", "reason": "costs"}
            approvals += [
                {"type": "tool-input-available", "toolCallId": call_id, "toolName": "pay", "input": {"sum": 1}},
                {"type": "tool-approval-request", **request, "approvalDescriptor": {}, "inputSchemaInput": None},
            ]
        approvals.append({"type": "tool-output-denied", "toolCallId": "q"})
    if since_7:
        approvals += [
            {"type": "tool-approval-response", "approvalId": "approve-r", "approved": True, "reason": "fine"},
            {"type": "tool-approval-response", "approvalId": "approve-q", "approved": False},
            {"type": "custom", "kind": "openai.thing", "providerMetadata": METADATA},
            {"type": "reasoning-file", "url": "data:,", "mediaType": "text/plain"},
            {"type": "steering-message", "id": "s-1", "parts": [{"type": "text", "text": "And?"}]},
            step,
            *text[:3],
            {"type": "tool-input-start", "toolCallId": "z", "toolName": "t", "inputEncoding": "text"},
            {"type": "tool-input-delta", "toolCallId": "z", "inputTextDelta": "{a"},
            {"type": "reset-step"},
            *text,
        ]
    streaming = [
        {"type": "tool-input-start", "toolCallId": "z", "toolName": "t"},
        {"type": "tool-input-delta", "toolCallId": "z", "inputTextDelta": '{"a": {"b": [1, "x'},
    ]
    return [
        [start, step, *text, *parts, end, step, *calls, end, step, *approvals, end, finish],
        [start, step, *text[:2], *text[4:6], end, step, *streaming, {"type": "abort"}],
        [start, step, *text, {"type": "error", "errorText": "overloaded"}, *text],
        [start, step, *text[1:]],
        [start, {"type": "tool-output-available", "toolCallId": "unknown", "output": 1}, *text],
        [start, *text, {**start, "messageId": "msg-2", "messageMetadata": {"model": "n"}}, *parts],
        [],
    ]


RECORDED = {version: _recorded(version) for version in (5, 6, 7)}


def _value(chance: random.Random, depth: int = 0) -> Any:
    kinds = 7 if depth < 3 else 5
    match chance.randrange(kinds):
        case 0:
            return None
        case 1:
            return chance.choice([True, False])
        case 2:
            return chance.choice([0, -1, 7, 1.5, 1e21, 12345678901])
        case 3 | 4:
            return chance.choice(["", "a", 'qu"ote', "back\\slash", "é\N{GRINNING FACE}", "line\nbreak", "}", "]", ","])
        case 5:
            return [_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        case _:
            names = ["a", "b", 'k"', "c d", "", "é"]
            return {chance.choice(names): _value(chance, depth + 1) for _ in range(chance.randrange(4))}


def _split(chance: random.Random, text: str) -> list[str]:
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(5)))
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _maybe(chance: random.Random, **fields: Any) -> Chunk:
    return {name: value for name, value in fields.items() if chance.random() < 0.3}


def _metadata(chance: random.Random) -> Chunk:
    return _maybe(chance, providerMetadata={chance.choice("xyz"): {"v": _value(chance, 2)}})


def _text_chunks(chance: random.Random, kind: str, id: str, sdk_version: int) -> list[Chunk]:
    text = "".join(chance.choice(["a", " ", "é", "\N{GRINNING FACE}", "\n"]) for _ in range(chance.randrange(12)))
    chunks = [{"type": f"{kind}-start", "id": id, **_metadata(chance)}]
    chunks += [
        {"type": f"{kind}-delta", "id": id, "delta": piece, **_metadata(chance)} for piece in _split(chance, text)
    ]
    if chance.random() < 0.85:
        source = {"type": "source", "sourceType": "url", "id": "s", "url": "https://example.org/"}
        cited = _maybe(chance, citations=[{"source": source}]) if sdk_version >= 7 and kind == "text" else {}
        chunks.append({"type": f"{kind}-end", "id": id, **cited, **_metadata(chance)})
    return chunks


def _call_chunks(chance: random.Random, call_id: str, sdk_version: int) -> list[Chunk]:
    """Return the chunks of a tool call that ends in any state."""
    dynamic = {"dynamic": True} if chance.random() < 0.4 else {}
    name = {"toolCallId": call_id, "toolName": chance.choice(["find", "look-up"]), **dynamic}
    details = _maybe(chance, title="Find", toolMetadata={"m": 1}, providerExecuted=True)
    value = _value(chance)
    chunks: list[Chunk] = []
    if chance.random() < 0.6:
        encoding = chance.choice([{}, {"inputEncoding": "json"}, {"inputEncoding": "text"}])
        chunks.append({"type": "tool-input-start", **name, **details, **encoding, **_metadata(chance)})
        text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
        pieces = _split(chance, text)
        pieces = pieces[: chance.randrange(len(pieces) + 1)]
        chunks += [{"type": "tool-input-delta", "toolCallId": call_id, "inputTextDelta": piece} for piece in pieces]
        if chance.random() < 0.2:
            return chunks
        if chance.random() < 0.15:
            error = {"toolCallId": call_id, "errorText": "no", **dynamic}
            return [*chunks, {"type": "tool-output-error", **error, **_metadata(chance)}]
    if chance.random() < 0.15:
        error = {**name, "input": value, "errorText": "bad", **details, **_metadata(chance)}
        return [*chunks, {"type": "tool-input-error", **error}]
    chunks.append({"type": "tool-input-available", **name, "input": value, **details, **_metadata(chance)})
    if sdk_version >= 6 and chance.random() < 0.4:
        optional = _maybe(
            chance, signature="s", approvalDescriptor={"d": 1}, inputSchemaInput=_value(chance), reason="costs"
        )
        automatic = _maybe(chance, isAutomatic=chance.random() < 0.5)
        request = {"toolCallId": call_id, "approvalId": "approve-" + call_id, **optional, **automatic}
        chunks.append({"type": "tool-approval-request", **request})
        if sdk_version >= 7 and chance.random() < 0.6:
            response = {"approvalId": "approve-" + call_id, "approved": chance.random() < 0.5}
            response |= _maybe(chance, reason="fine", providerExecuted=True) | _metadata(chance)
            chunks.append({"type": "tool-approval-response", **response})
        if chance.random() < 0.4:
            return [*chunks, {"type": "tool-output-denied", "toolCallId": call_id}]
    result = {"toolCallId": call_id, **dynamic, **_maybe(chance, toolMetadata={"m": 2}, providerExecuted=True)}
    for _ in range(chance.randrange(3)):
        preliminary = _maybe(chance, preliminary=True)
        chunks.append(
            {"type": "tool-output-available", **result, "output": _value(chance), **preliminary, **_metadata(chance)}
        )
    if chance.random() < 0.2:
        chunks.append({"type": "tool-output-error", **result, "errorText": "no", **_metadata(chance)})
    return chunks


def _part_chunks(chance: random.Random, sdk_version: int) -> list[Chunk]:
    url = {"url": "https://example.org/", "mediaType": "text/plain"}
    document = {"type": "source-document", "sourceId": "d", "mediaType": "text/plain", "title": "T"}
    name = chance.choice("xyz")
    data = {"type": f"data-{name}", "data": _value(chance), **_maybe(chance, id=chance.choice("12"))}
    choices: list[Chunk] = [
        {"type": "source-url", "sourceId": "s", "url": url["url"], **_maybe(chance, title="T"), **_metadata(chance)},
        {**document, **_maybe(chance, filename="f.txt"), **_metadata(chance)},
        {"type": "file", **url, **_metadata(chance)},
        data,
        {**data, "id": "1", **_maybe(chance, transient=chance.random() < 0.5)},
        {"type": "message-metadata", "messageMetadata": {name: _value(chance), "n": {"m": _value(chance)}}},
    ]
    if sdk_version >= 7:
        choices += [
            {"type": "custom", "kind": "a.b", **_metadata(chance)},
            {"type": "reasoning-file", **url, **_metadata(chance)},
            {"type": "steering-message", "id": "s", "parts": [{"type": "text", "text": "And?"}]},
        ]
    return [chance.choice(choices)]


def _interleave(chance: random.Random, sequences: list[list[Chunk]]) -> list[Chunk]:
    order = [number for number, sequence in enumerate(sequences) for _ in sequence]
    chance.shuffle(order)
    iterators = [iter(sequence) for sequence in sequences]
    return [next(iterators[number]) for number in order]


def random_stream(chance: random.Random, sdk_version: int, message_id: str = "msg-1") -> list[Chunk]:
    """Return a stream that the reader reads to its end."""
    chunks: list[Chunk] = [
        {"type": "start", "messageId": message_id, **_maybe(chance, messageMetadata={"n": {"k": 1}})}
    ]
    prefix = f"{chance.random():.6f}"  # call ids are unique
    for step in range(chance.randrange(4)):
        parts: list[list[Chunk]] = []
        for number in range(chance.randrange(5)):
            match chance.randrange(4):
                case 0:
                    parts.append(_text_chunks(chance, chance.choice(["text", "reasoning"]), str(number), sdk_version))
                case 1 | 2:
                    parts.append(_call_chunks(chance, f"call-{prefix}-{step}-{number}", sdk_version))
                case _:
                    parts.append(_part_chunks(chance, sdk_version))
        reset = [{"type": "reset-step"}] if sdk_version >= 7 and chance.random() < 0.1 else []
        interleaved = _interleave(chance, parts)
        chunks += [{"type": "start-step"}, *interleaved, *reset, {"type": "finish-step"}]
    chunks.append({"type": "finish", **_maybe(chance, messageMetadata={"n": {"l": 2}, "z": [1]})})
    return chunks


def shuffled_stream(chance: random.Random, sdk_version: int, message_id: str = "msg-1") -> list[Chunk]:
    """Return chunks with few ids in any order. The reader stops at some of them, most often not at the first ones."""
    pool: list[Chunk] = []
    for id in "12":
        pool += _text_chunks(chance, "text", id, 7) + _text_chunks(chance, "reasoning", id, 7)
        pool += _call_chunks(chance, id, 7) * 2 + _call_chunks(chance, id, 7)
    pool += _part_chunks(chance, 7) + _part_chunks(chance, 7)
    pool += [
        {"type": type} for type in ("start-step", "start-step", "finish-step", "reset-step", "abort", "unknown-type")
    ]
    pool += [{"type": "start", "messageId": chance.choice([message_id, message_id, "msg-2"])}]
    pool += [chunk for chunk in pool if chunk["type"].endswith(("-start", "available"))]
    chance.shuffle(pool)
    if chance.random() < 0.1:
        pool.insert(chance.randrange(len(pool)), {"type": "error", "errorText": "no"})
    # Without the chunks that cannot be read at their position, except for a few.
    assembly = _Assembly(None, "", sdk_version)
    return [
        chunk
        for chunk in [{"type": "start", "messageId": message_id}, *pool]
        if assembly.add(chunk) or chance.random() < 0.02
    ]


PARTIAL_JSON = [
    "",
    " ",
    "{",
    '{"',
    '{"a',
    '{"a"',
    '{"a":',
    '{"a":-',
    '{"a":1.',
    '{"a":1e',
    '{"a":1e+5',
    '{"a":nul',
    '{"a":"x\\',
    '{"a":"x\\u12',
    '{"a":"\\ud83d',
    '{"a\\"b": 1, "c',
    '{"a":1} trailing',
    '{"a":1 @ "b"',
    "{abc",
    "[ ",
    "[-",
    "[1, -",
    "[1-",
    "[01",
    "[1}2",
    "[tru",
    "[trx",
    "[true}",
    "[[1,2],[",
    "NaN",
    "[1e999",
    "[12345678901234567890, -98765432109876543210.5, 1",
    "[1" + "0" * 5000,
    "-",
    "12",
    '"abc',
    "t",
    '{"__proto__": 1',
    '{"constructor": {"prototype": 1}, "x',
    '{"constructor": {"p": 1}, "x',
    "\ufeff[1",
    "[" * 200,
]


def random_texts(chance: random.Random, count: int) -> list[str]:
    """Return beginnings of JSON texts, some with an error."""
    texts = []
    for _ in range(count):
        text = json.dumps([_value(chance), _value(chance)] if chance.random() < 0.5 else {"k": _value(chance)})
        if chance.random() < 0.5:
            text = json.dumps(json.loads(text), indent=1, ensure_ascii=False)
        text = text[: chance.randrange(len(text) + 1)]
        if chance.random() < 0.5:
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(text) + 1)
                text = text[:at] + chance.choice('{}[],:"\\u1-.etfn x') + text[at + chance.randrange(2) :]
        texts.append(text)
    return texts
