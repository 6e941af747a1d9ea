"""Output of the commands: aligned columns, escaped text, ages, and entries as JSON. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

from ..models import ConversationInfo, StreamInfo

Row = TypeVar("Row")

PAGE_ROWS = 1000  # rows of a list that are printed at once
COLUMNS = ("ID", "STATE", "CHUNKS", "AGE", "SESSION", "OWNER")

_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def age(time: datetime | None, now: datetime) -> str:
    """Return the time since `time` in its largest whole unit, such as `3m`. Return `-` if it is unknown."""
    if time is None:
        return "-"
    seconds = max(0, int((now - time).total_seconds()))  # not negative if the clocks differ
    unit, length = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    return f"{seconds // length}{unit}"


def stream_row(info: StreamInfo, now: datetime) -> list[str]:
    """Return the cells of a stream in the order of `COLUMNS`."""
    cells = [info.id, info.state, str(info.total_chunks), age(info.created_at, now), info.session_id, info.owner]
    return ["-" if cell is None else printable(cell) for cell in cells]


def printable(text: str) -> str:
    """Escape control characters, so that no id moves the cursor of a terminal, or breaks a line."""
    return _CONTROL_CHARACTERS.sub(lambda found: repr(found[0])[1:-1], text)


def align(rows: Sequence[Sequence[str]], widths: list[int]) -> str:
    """Return rows as lines with aligned columns. Increase `widths`, in characters, where a cell is wider."""
    for cells in rows:
        widths[:] = map(max, widths, map(len, cells))
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() + "\n"
        for cells in rows
    )


def pages(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield lists of at most `PAGE_ROWS` rows, so that a long list is printed while it is read.

    Without rows, yield an empty list, whose heading shows that there are none.
    """
    remaining = iter(rows)
    yield list(islice(remaining, PAGE_ROWS))
    while page := list(islice(remaining, PAGE_ROWS)):
        yield page


def aligned_pages(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a heading and rows as lines with aligned columns, a page at a time."""
    widths = list(map(len, heading))
    above = [heading]
    for page in pages(rows):
        yield align([*above, *page], widths)
        above = []


def fields(info: StreamInfo | ConversationInfo) -> dict[str, Any]:
    """Return the attributes of an entry as values of JSON. Times are texts in ISO 8601, and the ttl is in seconds."""
    return {name: _plain(value) for name, value in info._asdict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else value


def describe_stream(info: StreamInfo, now: datetime) -> str:
    """Return all attributes of a stream as aligned lines."""
    described = {}
    for name, value in fields(info).items():
        if value is None:
            text = "-"
        elif isinstance(value, str):
            text = printable(value)
        else:
            text = printable(json.dumps(value, ensure_ascii=False))
        described[name.replace("_", " ") + ":"] = text
    if info.created_at is not None:
        described["created at:"] += f" ({age(info.created_at, now)} ago)"
    if info.lease_until is not None and info.lease_until < now:
        described["lease until:"] += f" (expired {age(info.lease_until, now)} ago)"
    if info.ttl is not None:
        described["ttl:"] += " seconds"
    return align(list(described.items()), [0, 0])
