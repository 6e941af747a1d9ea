"""The tables that the migrations create, as read from their files. Pure, except for reading the files."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..schema import SQL_FOLDER

TYPES = {
    "TEXT": "text",
    "INTEGER": "integer",
    "BIGINT": "bigint",
    "JSONB": "jsonb",
    "TIMESTAMPTZ": "timestamp with time zone",
}

_TYPE = "|".join(TYPES)
_CREATE_TABLE = re.compile(r"CREATE TABLE IF NOT EXISTS (\w+) \((.*)\)", re.DOTALL)
_ALTER_TABLE = re.compile(r"ALTER TABLE (\w+)\s(.*)", re.DOTALL)
_CREATE_INDEX = re.compile(r"CREATE INDEX IF NOT EXISTS (\w+)\s+ON (\w+)")
_COLUMN = re.compile(rf"^\s*(\w+)\s+({_TYPE})\b", re.MULTILINE)
_ADDED_COLUMN = re.compile(rf"ADD COLUMN IF NOT EXISTS (\w+) ({_TYPE})\b")
_DEFAULT = re.compile(r"ALTER COLUMN (\w+) SET DEFAULT")


class ExpectedColumn(NamedTuple):
    """A column, with the type as PostgreSQL names it, and the number of the migration that adds it."""

    table: str
    name: str
    type: str
    migration: str


class ExpectedObject(NamedTuple):
    """An index, or a column that has a default, of a table, and the number of the migration that creates it."""

    table: str
    name: str
    migration: str


class ExpectedTables(NamedTuple):
    """The tables after all migrations, with their default names."""

    tables: dict[str, str]  # the names, and the numbers of the migrations
    columns: list[ExpectedColumn]
    indexes: list[ExpectedObject]
    defaults: list[ExpectedObject]


def read_migrations() -> ExpectedTables:
    """Read the migrations.

    Raises:
        FileNotFoundError: The package has no SQL files.
    """
    files = {file.name: file.read_text("utf-8") for file in SQL_FOLDER.iterdir() if file.name.endswith(".sql")}
    if not files:
        raise FileNotFoundError(f"{SQL_FOLDER} has no SQL files")
    return parse_migrations({name[:4]: files[name] for name in sorted(files)})


def parse_migrations(texts: dict[str, str]) -> ExpectedTables:
    """Parse migrations. `texts` are their texts by their numbers, in order."""
    expected = ExpectedTables({}, [], [], [])
    for migration, text in texts.items():
        for statement in re.sub(r"--[^\n]*", "", text).split(";"):
            if match := _CREATE_TABLE.search(statement):
                expected.tables.setdefault(match[1], migration)
                found = _COLUMN.findall(match[2])
                expected.columns.extend(ExpectedColumn(match[1], name, TYPES[kind], migration) for name, kind in found)
            elif match := _ALTER_TABLE.search(statement):
                table, actions = match[1], match[2]
                found = _ADDED_COLUMN.findall(actions)
                expected.columns.extend(ExpectedColumn(table, name, TYPES[kind], migration) for name, kind in found)
                expected.defaults.extend(ExpectedObject(table, name, migration) for name in _DEFAULT.findall(actions))
            elif match := _CREATE_INDEX.search(statement):
                expected.indexes.append(ExpectedObject(match[2], match[1], migration))
    return expected
