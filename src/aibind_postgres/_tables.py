"""Names of tables: parsed once, checked, quoted, and the names derived from them. Pure."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from psycopg.sql import Identifier

CHUNKS_TABLE = "aibind_stream_chunks"
STATUS_TABLE = "aibind_stream_status"
CONVERSATIONS_TABLE = "aibind_conversations"

MAX_NAME_BYTES = 63  # PostgreSQL cuts longer names off in silence (NAMEDATALEN - 1)


class Table(NamedTuple):
    """A table, with its schema unless `search_path` is to find it."""

    schema: str | None
    name: str

    @classmethod
    def parse(cls, name: str | Identifier) -> Table:
        """Parse "table", "schema.table", or an `Identifier`, which also serves for names that contain a dot.

        Every part is taken to the letter, as if it stood in double quotes in SQL. Raises `ValueError` for a part
        that is empty, longer than 63 bytes, or not storable as a name.
        """
        if isinstance(name, Identifier):
            try:
                text = name.as_string(None)
            except UnicodeEncodeError:
                raise ValueError("a table name contains a lone surrogate") from None
            quoted = re.findall(r'"((?:[^"]|"")*)"', text)
            parts = [part.replace('""', '"') for part in quoted]
        elif isinstance(name, str):
            parts = name.split(".")
        else:
            raise TypeError(f"a table name must be a str or a psycopg.sql.Identifier, not {type(name).__name__}")
        if len(parts) > 2:
            raise ValueError(
                f"{name!r} has more parts than schema.table: use psycopg.sql.Identifier for a dot in a name"
            )
        for part in parts:
            _check(part)
        return cls(parts[0] if len(parts) == 2 else None, parts[-1])

    @property
    def quoted(self) -> str:
        """The table as SQL text."""
        return self.qualify(self.name)

    @property
    def channel(self) -> str:
        """The channel on which changes of this table are announced: its bare name.

        The schema is left out, so that it is one channel for those who name the schema and those who leave that to
        `search_path`. Announcements are hints: one that was meant for another schema's table costs a look-up.
        """
        return self.name

    def qualify(self, name: str) -> str:
        """Return `name` as SQL text for something that lives in this table's schema."""
        return quote(name) if self.schema is None else f"{quote(self.schema)}.{quote(name)}"

    def derive(self, suffix: str) -> str:
        """Return a name made of this table's name and `suffix`, shortened by a digest where it would not fit."""
        derived = self.name + suffix
        if len(derived.encode()) <= MAX_NAME_BYTES:
            return derived
        tail = f"_{hashlib.sha256(self.name.encode()).hexdigest()[:8]}{suffix}"
        room = MAX_NAME_BYTES - len(tail.encode())
        return self.name.encode()[:room].decode(errors="ignore") + tail


def distinct(*tables: str | Identifier) -> list[Table]:
    """Parse names that must not be the same."""
    parsed = [Table.parse(table) for table in tables]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"these tables must differ: {', '.join(table.quoted for table in parsed)}")
    return parsed


def quote(name: str) -> str:
    """Return `name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _check(part: str) -> None:
    if not part:
        raise ValueError("a table name, and its schema's, must not be empty")
    if "\0" in part:
        raise ValueError("a table name must not contain a NUL character")
    try:
        length = len(part.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the table name {part!r} contains a lone surrogate") from None
    if length > MAX_NAME_BYTES:
        raise ValueError(f"the name {part!r} has {length} bytes, and PostgreSQL's names have at most {MAX_NAME_BYTES}")
