"""The assembled UIMessages equal those of the published reader, `readUIMessageStream` of the npm package `ai`."""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.npm import run_node
from support.ui_streams import PARTIAL_JSON, RECORDED, random_stream, random_texts, shuffled_stream

from aibind_postgres._partial_json import ABSENT, parse_partial_json
from aibind_postgres._ui_message import assemble
from aibind_postgres._ui_message_chunks import message_chunks

SCRIPT = Path(__file__).parent.parent / "npm" / "read_ui_messages.mjs"
STREAMS = 500

pytestmark = pytest.mark.parametrize("sdk_version", [5, 6, 7])


class Case(NamedTuple):
    chunks: list[dict[str, Any]]
    message: dict[str, Any] | None = None


class Run(NamedTuple):
    """Everything that one process of Node has read, with one major version."""

    recorded: list[tuple[Case, dict[str, Any]]]
    valid: list[tuple[Case, dict[str, Any]]]
    shuffled: list[tuple[Case, dict[str, Any]]]
    continued: list[tuple[Case, dict[str, Any]]]
    rebuilt: list[tuple[Case, dict[str, Any]]]
    values: list[tuple[str, list[Any]]]
    invalid: list[dict[str, Any]]


def as_json(value: Any) -> Any:
    """Return a value as JavaScript reads it from JSON: integers are floats."""
    return json.loads(json.dumps(value), parse_int=float)


@cache
def run(sdk_version: int) -> Run:
    chance = random.Random(sdk_version)
    recorded = [Case(chunks) for chunks in RECORDED[sdk_version]]
    valid = [Case(random_stream(chance, sdk_version)) for _ in range(STREAMS)]
    shuffled = [Case(shuffled_stream(chance, sdk_version)) for _ in range(STREAMS // 2)]
    messages = [assemble(case.chunks, sdk_version=sdk_version) for case in recorded + valid]
    continued = [
        Case((random_stream if chance.random() < 0.5 else shuffled_stream)(chance, sdk_version, message["id"]), message)
        for message in messages[::2]
    ]
    rebuilt = [Case(message_chunks(message, sdk_version), message) for message in messages]
    texts = PARTIAL_JSON + random_texts(chance, 1500)
    groups = [recorded, valid, shuffled, continued, [Case(case.chunks) for case in rebuilt]]
    cases = [case for group in groups for case in group]
    streams = [{"chunks": case.chunks} | ({"message": case.message} if case.message else {}) for case in cases]
    sent = {"streams": streams, "texts": texts, "valid": [chunk for case in rebuilt for chunk in case.chunks]}
    got = json.loads(run_node(f"ai{sdk_version}", SCRIPT, json.dumps(sent)), parse_int=float)
    read = iter(got["messages"])
    groups[-1] = rebuilt
    pairs = [[(case, next(read)) for case in group] for group in groups]
    return Run(*pairs, list(zip(texts, got["values"], strict=True)), got["invalid"])


def check(pairs: list[tuple[Case, dict[str, Any]]], sdk_version: int) -> None:
    for case, expected in pairs:
        before = copy.deepcopy(case.message)
        assembled = assemble(case.chunks, case.message, sdk_version=sdk_version)
        assert as_json(assembled) == expected, json.dumps(case.chunks)
        assert case.message == before


def test_recorded_streams_of_all_chunk_types(sdk_version: int) -> None:
    check(run(sdk_version).recorded, sdk_version)


def test_random_valid_streams(sdk_version: int) -> None:
    check(run(sdk_version).valid, sdk_version)


def test_streams_in_any_order(sdk_version: int) -> None:
    check(run(sdk_version).shuffled, sdk_version)


def test_continued_messages(sdk_version: int) -> None:
    check(run(sdk_version).continued, sdk_version)


def test_rebuilt_messages(sdk_version: int) -> None:
    for case, expected in run(sdk_version).rebuilt:
        assert case.message == assemble(case.chunks, sdk_version=sdk_version)
        assert as_json(case.message) == expected
    assert run(sdk_version).invalid == []


def test_replay_of_continued_messages(sdk_version: int) -> None:
    chance = random.Random(sdk_version)
    for case, _ in run(sdk_version).valid:
        message = assemble(case.chunks, sdk_version=sdk_version)
        more = random_stream(chance, sdk_version, message["id"])
        replayed = assemble(message_chunks(message, sdk_version) + more, sdk_version=sdk_version)
        assert replayed == assemble(more, message, sdk_version=sdk_version)


def test_partial_json(sdk_version: int) -> None:
    for text, expected in run(sdk_version).values:
        value = parse_partial_json(text, sdk_version)
        assert ([] if value is ABSENT else [as_json(value)]) == expected, text
