"""Render the migrations for given table names, and apply them.

All migrations are idempotent, so applied migrations are not recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

from psycopg.sql import Identifier

from ._async.psycopg_clients import AsyncClientLike
from ._async.psycopg_clients import as_client as as_async_client
from ._partitions import PARTITIONS_DIFFER, PartitionsLike, check_partitions, fill_names, is_partitioned, unused_tag
from ._sql_commands import split_commands
from ._sqlstate import server_reason, sqlstate
from ._sync.psycopg_clients import ClientLike, as_client
from ._tables import (
    ARCHIVE_SUFFIX,
    CHUNKS_TABLE,
    CONVERSATIONS_TABLE,
    STATUS_TABLE,
    Table,
    literal,
    parse_distinct,
    quote,
)
from ._time_partition_sql import create_partitions
from ._time_partitions import days_ahead
from .errors import SchemaError

_PACKAGED = resources.files(__package__) / "sql"  # also in a zip file; in a checkout, the folder is at the top level
SQL_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "sql"

# The files in their order. Each condition is true if the last statement of its file has run.
_MIGRATIONS = {
    "0001_tables.sql": "to_regclass({conversations}) IS NOT NULL",
    "0002_housekeeping.sql": "EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass({chunks}) "
    "AND attname = 'created_at' AND atthasdef)",
    "0003_conversations.sql": "to_regclass({expiry_index}) IS NOT NULL",
    "0004_chats.sql": "to_regclass({time_index}) IS NOT NULL",
    "0005_archive.sql": "to_regclass({archive}) IS NOT NULL",
}
_NOTIFY_TRIGGER = {
    "optional/notify_trigger.sql": "EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass({status}) "
    "AND tgname = {trigger})"
}
_MONITORING = {"optional/monitoring.sql": "true"}
_CITUS = {"optional/citus.sql": "to_regproc({append}) IS NOT NULL"}

# Matches the default table names and the names derived from them: indexes, triggers and, with a parenthesis, functions.
# In single quotes, the name of the status table is the channel, unless its object is looked up. Comments are matched to
# skip them, since a table name with a line break would end the comment.
_NAMES = re.compile(
    rf"--[^\n]*|'(?P<channel>{STATUS_TABLE})'|(?:\b(?P<lookup>to_reg(?:class|proc)\()')?"
    rf"\b(?P<table>{CHUNKS_TABLE}|{STATUS_TABLE}|{CONVERSATIONS_TABLE})(?P<suffix>_\w+)?\b(?P<end>[(']?)"
)

_TAGS = re.compile(r"\$[a-z]+\$")


def render(
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
    partitions: int | Literal["time"] | None = None,
    citus: bool = False,
) -> str:
    """Return the SQL that creates or updates the schema, for tools such as psql, Alembic, Django and Flyway.

    Args:
        chunks_table: The name of the chunks table; `aibind_stream_chunks` by default.
        status_table: The name of the status table; `aibind_stream_status` by default.
        conversations_table: The name of the conversations table; `aibind_conversations` by default.
        notify_trigger: Whether to add a trigger that notifies readers when other software writes, such as the
            TypeScript package; False by default.
        partitions: The number of partitions by hash of the id that the chunks table and the status table get, from 1 to
            1,024. "time" creates partitions by the day of the id, which a housekeeper creates and drops. This cannot
            change later. By default, the tables are created without partitions, and existing tables keep those that
            they have.
        citus: Whether to distribute the tables over the workers of a Citus cluster, on whose coordinator the SQL runs;
            False by default. The tables are blocked while their rows are copied.

    Returns:
        The SQL text. It raises an error, and changes nothing else, if the tables exist with other partitions, or
        without.

    Raises:
        ValueError: A table name is invalid, two names are the same, `partitions` is out of range, or `citus`
            is combined with `partitions` or with `notify_trigger`, which would notify on the workers, where no reader
            listens.
        TypeError: A table name is neither a str nor an `Identifier`, or `partitions` is neither an int nor
            "time".
        FileNotFoundError: The package has no SQL files, such as in a program that was frozen without them.

    Example:
        >>> sql = render(status_table="chat.status", chunks_table="chat.chunks")
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    return _render(tables, _files(notify_trigger, citus, partitions), partitions)


def statements(
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
    partitions: int | Literal["time"] | None = None,
    citus: bool = False,
) -> list[str]:
    """Return the SQL of `render` as single commands, for drivers that accept only one at a time, such as asyncpg.

    Args:
        chunks_table: As for `render`.
        status_table: As for `render`.
        conversations_table: As for `render`.
        notify_trigger: As for `render`.
        partitions: As for `render`.
        citus: As for `render`.

    Returns:
        The commands in their order, without semicolons. Run all of them in one transaction.

    Raises:
        ValueError: As for `render`.
        TypeError: As for `render`.
        FileNotFoundError: As for `render`.

    Example:
        >>> for statement in statements():  # in an Alembic migration
        ...     op.execute(statement)  # doctest: +SKIP
    """
    sql = render(
        chunks_table=chunks_table,
        status_table=status_table,
        conversations_table=conversations_table,
        notify_trigger=notify_trigger,
        partitions=partitions,
        citus=citus,
    )
    return split_commands(sql)


def monitoring_views(
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
) -> str:
    """Return the SQL that creates two views of the tables for a monitoring system. docs/telemetry.md describes them.

    Their names are the name of the status table with `_summary` and `_tables`. All migrations must have been applied.

    Args:
        chunks_table: As for `render`.
        status_table: As for `render`.
        conversations_table: As for `render`.

    Returns:
        The SQL text, which is safe to repeat.

    Raises:
        ValueError: As for `render`.
        TypeError: As for `render`.
        FileNotFoundError: As for `render`.
    """
    return _render(parse_distinct(chunks_table, status_table, conversations_table), _MONITORING, None)


def _statements_of_file(file: str, chunks_table: str, status_table: str, conversations_table: str) -> list[str]:
    """Return the commands of one file of `sql/`, for migrations of a framework.

    Args:
        file: The name of the file, such as "0001_tables.sql".
        chunks_table: As for `render`, like the following arguments.
        status_table: See `render`.
        conversations_table: See `render`.

    Returns:
        The commands in their order, without semicolons, as those of `statements`.

    Raises:
        ValueError: A table name is invalid, or two names are the same.
        FileNotFoundError: There is no such file.
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    return split_commands(_render(tables, {file: ""}, None))


def migrate(
    client: ClientLike,
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
    partitions: int | Literal["time"] | None = None,
    citus: bool = False,
) -> None:
    """Create or update the schema in one transaction. Safe to repeat, and to run in several processes at once.

    Permissions to change the schema, and a server that is not read-only, are needed only if there is something to do.

    Args:
        client: A client, as for a store. If it is a connection inside a transaction, the schema is created in that
            transaction.
        chunks_table: As for `render`.
        status_table: As for `render`.
        conversations_table: As for `render`.
        notify_trigger: As for `render`.
        partitions: As for `render`. "time" also creates the partitions of the next days that are missing. This waits
            for the transactions that use the tables, and later appends and reads wait for it: call it at a quiet time.
        citus: As for `render`.

    Raises:
        SchemaError: The tables exist with other partitions, or without.
        ValueError: As for `render`.
        TypeError: As for `render`.
        FileNotFoundError: As for `render`.

    Example:
        >>> migrate("postgresql://localhost/app")  # doctest: +SKIP
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    statement = _as_one_statement(tables, _files(notify_trigger, citus, partitions), partitions)
    with _schema_errors(), as_client(client) as opened:
        opened.query(statement, ())


async def async_migrate(
    client: AsyncClientLike,
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
    partitions: int | Literal["time"] | None = None,
    citus: bool = False,
) -> None:
    """Create or update the schema, as `migrate` does, with an asynchronous client.

    Args:
        client: A client, as for an asynchronous store.
        chunks_table: As for `render`.
        status_table: As for `render`.
        conversations_table: As for `render`.
        notify_trigger: As for `render`.
        partitions: As for `render`. "time" also creates the partitions of the next days that are missing. This waits
            for the transactions that use the tables, and later appends and reads wait for it: call it at a quiet time.
        citus: As for `render`.

    Raises:
        SchemaError: The tables exist with other partitions, or without.
        ValueError: As for `render`.
        TypeError: As for `render`.
        FileNotFoundError: As for `render`.
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    statement = _as_one_statement(tables, _files(notify_trigger, citus, partitions), partitions)
    with _schema_errors():
        async with as_async_client(client) as opened:
            await opened.query(statement, ())


@contextmanager
def _schema_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if sqlstate(error) == PARTITIONS_DIFFER:
            raise SchemaError(server_reason(error) or str(error)) from error
        raise


def _files(notify_trigger: bool, citus: bool, partitions: PartitionsLike) -> dict[str, str]:
    """Return the files to run, each with the condition that is true if its last statement has run."""
    if partitions is not None and citus:
        raise ValueError("partitions and citus exclude each other: Citus divides tables without partitions")
    if notify_trigger and citus:
        raise ValueError("notify_trigger and citus must not both be True: no reader listens on the workers of Citus")
    return _MIGRATIONS | (_NOTIFY_TRIGGER if notify_trigger else {}) | (_CITUS if citus else {})


def _render(tables: list[Table], files: dict[str, str], partitions: PartitionsLike) -> str:
    check_partitions(partitions, tables)
    by_default_name = dict(zip((CHUNKS_TABLE, STATUS_TABLE, CONVERSATIONS_TABLE), tables, strict=True))

    def replace_name(match: re.Match[str]) -> str:
        if match["channel"]:
            return quote(by_default_name[STATUS_TABLE].channel)  # the argument of a trigger may be an identifier
        if match["table"] is None:
            return match[0]
        return _render_name(by_default_name[match["table"]], match["suffix"] or "", match["lookup"], match["end"])

    # In one transaction with other changes of distributed tables, Citus creates no function without this setting.
    settings = "SET LOCAL citus.multi_shard_modify_mode = 'sequential';\n" if files.keys() & _CITUS.keys() else ""
    fill_others = partial(_NAMES.sub, replace_name)
    texts = (
        fill_names(_with_free_tags(_read(name), tables), by_default_name, partitions, fill_others) for name in files
    )
    return settings + "\n".join(texts)


def _with_free_tags(sql: str, tables: list[Table]) -> str:
    """Rename the tags of dollar quotes that occur in the name of a table, which the quoted text may contain."""
    names = "".join(table.quoted for table in tables)
    for tag in set(_TAGS.findall(sql)):
        free = tag
        while free in names:
            free = f"{free[:-1]}_$"
        sql = sql.replace(tag, free)
    return sql


def _read(name: str) -> str:
    file = SQL_FOLDER.joinpath(*name.split("/"))
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: include the data files of aibind_postgres in the program, such as with "
            "`pyinstaller --collect-data aibind_postgres`"
        )
    return file.read_text("utf-8")


def _render_name(table: Table, suffix: str, lookup: str | None, end: str) -> str:
    if suffix == ARCHIVE_SUFFIX:
        qualified = table.archive.quoted
        return lookup + literal(qualified) if lookup else qualified + end
    qualified = table.qualify(table.derive(suffix))
    if lookup:
        return lookup + literal(qualified)
    # CREATE INDEX and CREATE TRIGGER use the schema of the table, and reject a qualified name. Functions need one.
    return (quote(table.derive(suffix)) if suffix and end != "(" else qualified) + end


def _as_one_statement(tables: list[Table], files: dict[str, str], partitions: PartitionsLike) -> str:
    # One statement is one transaction with every driver and pooler. The lock serializes concurrent migrations, since
    # CREATE TABLE IF NOT EXISTS can fail if two of them create the same table. PostgreSQL checks the permissions of a
    # statement also if it has nothing to do.
    script = f"""
BEGIN
PERFORM pg_advisory_xact_lock(hashtext('aibind_postgres.schema.migrate'));
BEGIN
{_render(tables, files, partitions)}
{_first_days(tables) if partitions == "time" else ""}
EXCEPTION WHEN insufficient_privilege OR read_only_sql_transaction THEN
  IF ({_applied(tables, files.values(), partitions)}) IS NOT TRUE THEN RAISE; END IF;
END;
END
"""
    tag = unused_tag("$migrate$", script)
    return f"DO {tag}{script}{tag}"


def _first_days(tables: list[Table]) -> str:
    """Return the PL/pgSQL blocks that create the partitions of today and the next days.

    SQL that is stored, such as in Flyway, contains no dates: a housekeeper creates these partitions.
    """
    chunks, status, _ = tables
    days = days_ahead(datetime.now(timezone.utc).date())
    return "\n".join(f"{create_partitions((status, chunks, chunks.archive), day, in_use=False)};" for day in days)


def _applied(tables: list[Table], conditions: Iterable[str], partitions: PartitionsLike) -> str:
    """Return the condition that all files have run."""
    chunks, status, conversations = tables
    names = {
        "chunks": chunks.quoted,
        "status": status.quoted,
        "conversations": conversations.quoted,
        "expiry_index": conversations.qualify(conversations.derive("_expires_at_idx")),
        "time_index": conversations.qualify(conversations.derive("_updated_at_idx")),
        "archive": chunks.archive.quoted,
        "trigger": status.derive("_notify_trigger"),
        "append": status.qualify(status.derive("_append")),
    }
    applied = " AND ".join(conditions).format_map({key: literal(name) for key, name in names.items()})
    if partitions is None:
        return applied
    return " AND ".join([applied, *(is_partitioned(table, partitions) for table in (chunks, status))])
