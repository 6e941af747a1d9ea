"""Parse, check and quote table names, and derive other names from them. Pure."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from psycopg.sql import Identifier

CHUNKS_TABLE = "aibind_stream_chunks"
STATUS_TABLE = "aibind_stream_status"
CONVERSATIONS_TABLE = "aibind_conversations"
ARCHIVE_SUFFIX = "_archive"  # of the name of the chunks table

MAX_NAME_BYTES = 63  # PostgreSQL silently truncates longer names (NAMEDATALEN - 1)


class Table(NamedTuple):
    """The name of a table. If `schema` is None, PostgreSQL searches `search_path`."""

    schema: str | None
    name: str

    @classmethod
    def parse(cls, name: str | Identifier) -> Table:
        """Parse a table name. Each part is taken literally, as if in double quotes in SQL.

        Args:
            name: "table", "schema.table", or an `Identifier`, for names that contain a dot.

        Raises:
            ValueError: A part is empty, longer than 63 bytes, or not a valid name; or there are more than two parts.
            TypeError: `name` is neither a str nor an `Identifier`.
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
                f"the table name {name!r} has more parts than schema.table: "
                "use psycopg.sql.Identifier for a name with a dot"
            )
        for part in parts:
            _check_part(part)
        return cls(parts[0] if len(parts) == 2 else None, parts[-1])

    @property
    def quoted(self) -> str:
        """The table as SQL text."""
        return self.qualify(self.name)

    @property
    def channel(self) -> str:
        """The NOTIFY channel for changes of this table: its name without the schema.

        Without the schema, stores that name it and stores that rely on `search_path` use the same channel. A
        notification for a table with the same name in another schema is ignored, unless both have a stream of its id.
        """
        return self.name

    @property
    def archive(self) -> Table:
        """The archive table for this chunks table."""
        return self._replace(name=self.derive(ARCHIVE_SUFFIX))

    def qualify(self, name: str) -> str:
        """Return `name` as SQL text, qualified with the schema of this table."""
        return quote(name) if self.schema is None else f"{quote(self.schema)}.{quote(name)}"

    @property
    def append_function(self) -> str:
        """The function of `sql/optional/citus.sql` for appends, as SQL text, if this is a status table."""
        return self.qualify(self.derive("_append"))

    def derive(self, suffix: str) -> str:
        """Return the table name with a suffix. If it exceeds 63 bytes, a digest replaces the end of the table name."""
        derived = self.name + suffix
        if len(derived.encode()) <= MAX_NAME_BYTES:
            return derived
        tail = f"_{hashlib.sha256(self.name.encode()).hexdigest()[:8]}{suffix}"
        available = MAX_NAME_BYTES - len(tail.encode())
        return self.name.encode()[:available].decode(errors="ignore") + tail


def parse_distinct(*tables: str | Identifier) -> list[Table]:
    """Parse table names that must differ.

    Raises:
        ValueError: A name is invalid, or two names are the same.
        TypeError: A name is neither a str nor an `Identifier`.
    """
    parsed = [Table.parse(table) for table in tables]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"the table names must differ: {', '.join(table.quoted for table in parsed)}")
    return parsed


def quote(name: str) -> str:
    """Return `name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return `text` as an SQL literal, under all settings."""
    backslashes_doubled = text.replace("\\", "\\\\")
    return "E'" + backslashes_doubled.replace("'", "''") + "'"


def _check_part(part: str) -> None:
    if not part:
        raise ValueError("a table name or schema name must not be empty")
    if "\0" in part:
        raise ValueError("a table name must not contain a NUL character")
    try:
        length = len(part.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the table name {part!r} contains a lone surrogate") from None
    if length > MAX_NAME_BYTES:
        raise ValueError(f"the table name {part!r} has {length} bytes: PostgreSQL allows at most {MAX_NAME_BYTES}")
