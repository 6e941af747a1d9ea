"""The lines of an export file, and the checks of a file to import."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aibind_postgres.cli.export_format import (
    Counts,
    FileError,
    end_line,
    header_line,
    is_common_time,
    line_of,
    records,
    time_text,
)

TEXT = "x\u2028\r\n\x01\\."


def stream(id: str = "a", **columns: Any) -> bytes:
    return line_of("stream", {"id": id, "state": "done", "total_chunks": 2, "expires_at": 5, **columns})


def chunk(seq: int, id: str = "a") -> bytes:
    return line_of("chunk", {"id": id, "seq": seq, "data": TEXT})


def conversation(id: str) -> bytes:
    return line_of("conversation", {"session_id": id, "data": "{}", "expires_at": 5})


START, END = header_line(), end_line(Counts(1, 2))


def test_complete_file() -> None:
    lines = [START, conversation("c"), stream(metadata=1.5), chunk(1), chunk(2), end_line(Counts(1, 2, 1))]
    found = list(records(lines))
    assert [(record.number, record.kind) for record in found] == [
        (2, "conversation"),
        (3, "stream"),
        (4, "chunk"),
        (5, "chunk"),
    ]
    assert found[2].fields == {"id": "a", "seq": 1, "data": TEXT}
    assert found[1].text == lines[2]


def test_gaps_are_kept() -> None:
    assert len(list(records([START, stream(total_chunks=9), chunk(2), chunk(9), END]))) == 3


@pytest.mark.parametrize(
    ("lines", "number", "reason"),
    [
        ([], 1, "the end of the export is missing"),
        ([stream()], 1, "not the header"),
        ([line_of("header", {"format": "other", "version": 1})], 1, "not the header"),
        ([line_of("header", {"format": "aibind-postgres", "version": 2})], 1, "version 2"),
        ([START, stream(), chunk(1), chunk(2)], 5, "the end of the export is missing"),
        ([START, stream(), chunk(1), END], 4, "counts"),
        ([START, chunk(1)], 2, "does not follow its stream"),
        ([START, stream(), chunk(1, "b")], 3, "does not follow its stream"),
        ([START, stream(), conversation("c"), chunk(1)], 4, "does not follow its stream"),
        ([START, stream(), chunk(2), chunk(1)], 4, "seq must be from 3 to 2"),
        ([START, stream(), chunk(0)], 3, "seq must be from 1 to 2"),
        ([START, stream(), chunk(3)], 3, "seq must be from 1 to 2"),
        ([START, stream("b"), stream("a")], 3, "twice, or not in the order"),
        ([START, stream("a"), stream("a")], 3, "twice, or not in the order"),
        ([START, conversation("a"), conversation("a")], 3, "twice, or not in the order"),
        ([START, stream(), chunk(1), chunk(2), END, END], 6, "after the end"),
        ([START, line_of("table", {})], 2, "unknown type 'table'"),
        ([START, stream(colour="red")], 2, "unknown key 'colour'"),
        ([START, stream(total_chunks=True)], 2, "total_chunks must be int, not bool"),
        ([START, stream(total_chunks=-1)], 2, "must not be negative"),
        ([START, stream(state="deleted")], 2, "not 'deleted'"),
        ([START, line_of("stream", {"id": "a"})], 2, "state is missing"),
        ([START, stream()[:-9]], 2, "not JSON in UTF-8"),
        ([START, b"\n"], 2, "not JSON in UTF-8"),
        ([START, b"[1]\n"], 2, "not an object with a type"),
        ([START, b'{"type":"stream","id":NaN}'], 2, "not JSON in UTF-8"),
        ([START, b'{"type":"stream","id":"\\u0000","state":"done","total_chunks":0,"expires_at":0}'], 2, "NUL"),
        ([START, b'{"type":"stream","id":"\\ud800","state":"done","total_chunks":0,"expires_at":0}'], 2, "surrogate"),
        ([START, stream(metadata={"a": "\ud800"})], 2, "surrogate"),
        ([START, b"\xff\n"], 2, "not JSON in UTF-8"),
        ([START, b"[" * 100_000], 2, "not JSON in UTF-8"),
    ],
)
def test_malformed_file(lines: list[bytes], number: int, reason: str) -> None:
    with pytest.raises(FileError) as caught:
        list(records(lines))
    assert (caught.value.line, reason in caught.value.reason) == (number, True), caught.value


def test_metadata_are_copied_unchanged() -> None:
    line = line_of("stream", {"id": "a", "owner": None}, '{"price": 1.10}')
    assert line == b'{"type":"stream","id":"a","metadata":{"price": 1.10}}\n'
    assert json.loads(line_of("stream", {"id": "a"}, "null")) == {"type": "stream", "id": "a"}


def test_times_are_those_of_postgresql() -> None:
    assert time_text(None) is None
    assert time_text(0) == "1970-01-01T00:00:00+00:00"
    assert time_text(1_120_000) == "1970-01-01T00:00:01.12+00:00"
    assert time_text(-1) == "1969-12-31T23:59:59.999999+00:00"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-30T10:00:00+00:00", True),
        ("2026-11-30T10:00:00.123456+00:00", True),
        ("2026-11-31T10:00:00+00:00", False),
        ("2026-11-30T10:00:60+00:00", False),
        ("2026-11-30T10:00:00+01:00", False),
        ("infinity", False),
        ("", False),
    ],
)
def test_common_times(text: str, expected: bool) -> None:
    assert is_common_time(text) == expected
