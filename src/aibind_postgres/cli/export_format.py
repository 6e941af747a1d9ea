"""The lines of an export file, and the checks of a file to import. Pure.

Each line is a JSON object: a header, conversations, streams with their chunks after each one, and an end with counts.
Keys are the names of columns. A column that is NULL is left out, so that tables with fewer migrations give the same
file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias

from .._arguments import storable_json, storable_text
from .._json import compact_json, reject_constant
from ..errors import InvalidDataError

VERSION = 1
FORMAT = "aibind-postgres"

Kind: TypeAlias = Literal["stream", "chunk", "conversation"]

# The columns of each kind, in the order of the keys. Not exported: the lease, which ends with its producer, and
# `archived_at`, since a file has all chunks in one form.
COLUMNS: dict[str, dict[str, type]] = {
    "stream": {
        "id": str,
        "state": str,
        "error": str,
        "total_chunks": int,
        "expires_at": int,
        "created_at": str,
        "session_id": str,
        "owner": str,
        "ttl_ms": int,
        "wire": str,
        "metadata": object,
    },
    "chunk": {"id": str, "seq": int, "data": str, "created_at": str},
    "conversation": {
        "session_id": str,
        "data": str,
        "expires_at": int,
        "owner": str,
        "title": str,
        "created_at": str,
        "updated_at": str,
        "metadata": object,
    },
}
REQUIRED = {
    "stream": ("id", "state", "total_chunks", "expires_at"),
    "chunk": ("id", "seq", "data"),
    "conversation": ("session_id", "data", "expires_at"),
}
KEYS = {"stream": "id", "conversation": "session_id"}

_EPOCH = datetime(1970, 1, 1)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,6})?\+00:00", re.ASCII)


class FileError(ValueError):
    """A line of a file cannot be imported.

    Attributes:
        line: The number of the line, from 1.
        reason: The fault, without any text of a chunk or a conversation.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class Record(NamedTuple):
    """A line of a file, except for the header and the end.

    Attributes:
        number: The number of the line, from 1.
        kind: The type of the line.
        fields: The columns.
        text: The line itself. It keeps the exact numbers of the metadata.
    """

    number: int
    kind: Kind
    fields: dict[str, Any]
    text: bytes


class Counts(NamedTuple):
    """The numbers of the records in a file."""

    streams: int = 0
    chunks: int = 0
    conversations: int = 0

    @classmethod
    def of(cls, kinds: Mapping[str, int]) -> Counts:
        """Return the counts of records by their type."""
        return cls(*(kinds.get(name.removesuffix("s"), 0) for name in cls._fields))


def line_of(kind: str, columns: dict[str, Any], metadata: str | None = None) -> bytes:
    """Return a line with its line feed.

    Args:
        kind: The type of the line.
        columns: The values. None is left out.
        metadata: JSON text that becomes part of the line unchanged, since Python would round its numbers.
    """
    text = compact_json({"type": kind, **{name: value for name, value in columns.items() if value is not None}})
    if metadata is not None and metadata != "null":
        text = f'{text[:-1]},"metadata":{metadata}}}'
    return (text + "\n").encode()


def header_line() -> bytes:
    """Return the first line of a file."""
    return line_of("header", {"format": FORMAT, "version": VERSION})


def end_line(counts: Counts) -> bytes:
    """Return the last line of a file."""
    return line_of("end", counts._asdict())


def time_text(microseconds: int | None) -> str | None:
    """Return a time since the epoch as PostgreSQL's `to_jsonb` does in UTC."""
    if microseconds is None:
        return None
    whole, point, digits = (_EPOCH + timedelta(microseconds=microseconds)).isoformat().partition(".")
    return f"{whole}{point}{digits.rstrip('0')}+00:00"


def is_common_time(text: str) -> bool:
    """Return whether a text is a valid time in the form of an export, so that the server need not check it."""
    if found := _TIME.fullmatch(text):
        with suppress(ValueError):
            datetime.fromisoformat(found[1])
            return True
    return False


def records(lines: Iterable[bytes]) -> Iterator[Record]:
    """Yield the records of a file, after checking each line and their order.

    Raises:
        FileError: A line is malformed, or the file is not complete.
    """
    counts: Counter[str] = Counter()
    last_keys: dict[str, str] = {}
    stream: dict[str, Any] | None = None
    last_seq = number = 0
    end: dict[str, Any] | None = None
    for number, line in enumerate(lines, 1):
        fields = _parse(number, line)
        kind = fields.pop("type")
        if number == 1:
            _check_header(kind, fields)
            continue
        if end is not None:
            raise FileError(number, "the line is after the end of the export: import each file by itself")
        if kind == "end":
            end = fields
            if end != Counts.of(counts)._asdict():
                raise FileError(number, "the counts differ from those of the file: lines are missing, or were added")
            continue
        _check_columns(number, kind, fields)
        if kind == "chunk":
            if stream is None or fields["id"] != stream["id"]:
                raise FileError(number, "the chunk does not follow its stream")
            if not last_seq < fields["seq"] <= stream["total_chunks"]:
                raise FileError(number, f"seq must be from {last_seq + 1} to {stream['total_chunks']}")
            last_seq = fields["seq"]
        else:
            key = fields[KEYS[kind]]
            if kind in last_keys and key <= last_keys[kind]:
                raise FileError(number, f"the {kind} is in the file twice, or not in the order of the ids")
            last_keys[kind] = key
            stream, last_seq = (fields if kind == "stream" else None), 0
        counts[kind] += 1
        yield Record(number, kind, fields, line)
    if end is None:
        raise FileError(number + 1, "the end of the export is missing: it was interrupted, or the file was cut off")


def _check_header(kind: str, fields: dict[str, Any]) -> None:
    if {"type": kind, "format": fields.get("format")} != {"type": "header", "format": FORMAT}:
        raise FileError(1, "not the header of an export of aibind-postgres")
    if fields.get("version") != VERSION:
        raise FileError(1, f"the file has version {fields.get('version')!r} of the format, not {VERSION}")


def _check_columns(number: int, kind: str, fields: dict[str, Any]) -> None:
    columns = COLUMNS.get(kind)
    if columns is None:
        raise FileError(number, f"unknown type {kind!r}")
    for name, value in fields.items():
        expected = columns.get(name)
        if expected is None:
            raise FileError(number, f"unknown key {name!r}")
        if expected is not object and type(value) is not expected:
            raise FileError(number, f"{name} must be {expected.__name__}, not {type(value).__name__}")
    for name in REQUIRED[kind]:
        if name not in fields:
            raise FileError(number, f"{name} is missing")
    try:
        for name, value in fields.items():
            if isinstance(value, str):
                storable_text(value, name)
        storable_json(fields.get("metadata"), "metadata")
    except InvalidDataError as error:
        raise FileError(number, str(error)) from None
    if kind == "stream" and (fields["total_chunks"] < 0 or fields["state"] == "deleted"):
        raise FileError(number, "total_chunks must not be negative, and the state not 'deleted'")


def _parse(number: int, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode(), parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        raise FileError(number, f"not JSON in UTF-8: {reason}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise FileError(number, "not an object with a type")
    return fields
