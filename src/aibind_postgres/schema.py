"""Render the migrations for given table names, and apply them.

All migrations are idempotent, so applied migrations are not recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from psycopg.sql import Identifier

from ._async.psycopg_clients import AsyncClientLike
from ._async.psycopg_clients import as_client as as_async_client
from ._sync.psycopg_clients import ClientLike, as_client
from ._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table, parse_distinct, quote

_PACKAGED = resources.files(__package__) / "sql"  # also in a zip file; in a checkout, the folder is at the top level
SQL_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "sql"

# The files in their order. Each condition is true if the last statement of its file has run.
_MIGRATIONS = {
    "0001_tables.sql": "to_regclass({conversations}) IS NOT NULL",
    "0002_housekeeping.sql": "EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass({chunks}) "
    "AND attname = 'created_at' AND atthasdef)",
    "0003_conversations.sql": "to_regclass({expiry_index}) IS NOT NULL",
    "0004_chats.sql": "to_regclass({time_index}) IS NOT NULL",
}
_NOTIFY_TRIGGER = {
    "optional/notify_trigger.sql": "EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass({status}) "
    "AND tgname = {trigger})"
}
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
    citus: bool = False,
) -> str:
    """Return the SQL that creates or updates the schema, for tools such as psql, Alembic, Django and Flyway.

    Args:
        chunks_table: The name of the chunks table; `aibind_stream_chunks` by default.
        status_table: The name of the status table; `aibind_stream_status` by default.
        conversations_table: The name of the conversations table; `aibind_conversations` by default.
        notify_trigger: Whether to add a trigger that notifies readers when other software writes, such as the
            TypeScript package; False by default.
        citus: Whether to distribute the tables over the workers of a Citus cluster, on whose coordinator the SQL runs;
            False by default. The tables are blocked while their rows are copied.

    Returns:
        The SQL text.

    Raises:
        ValueError: A table name is invalid, two names are the same, or both `notify_trigger` and `citus` are True: the
            trigger would notify on the workers, where no reader listens.
        TypeError: A table name is neither a str nor an `Identifier`.
        FileNotFoundError: The package has no SQL files, such as in a program that was frozen without them.

    Example:
        >>> sql = render(status_table="chat.status", chunks_table="chat.chunks")
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    return _render(tables, _files(notify_trigger, citus))


def migrate(
    client: ClientLike,
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
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
        citus: As for `render`.

    Raises:
        ValueError: As for `render`.
        TypeError: A table name is neither a str nor an `Identifier`.
        FileNotFoundError: As for `render`.

    Example:
        >>> migrate("postgresql://localhost/app")  # doctest: +SKIP
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    with as_client(client) as opened:
        opened.query(_as_one_statement(tables, _files(notify_trigger, citus)), ())


async def async_migrate(
    client: AsyncClientLike,
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
    citus: bool = False,
) -> None:
    """Create or update the schema, as `migrate` does, with an asynchronous client.

    Args:
        client: A client, as for an asynchronous store.
        chunks_table: As for `render`.
        status_table: As for `render`.
        conversations_table: As for `render`.
        notify_trigger: As for `render`.
        citus: As for `render`.

    Raises:
        ValueError: As for `render`.
        TypeError: A table name is neither a str nor an `Identifier`.
        FileNotFoundError: As for `render`.
    """
    tables = parse_distinct(chunks_table, status_table, conversations_table)
    async with as_async_client(client) as opened:
        await opened.query(_as_one_statement(tables, _files(notify_trigger, citus)), ())


def _files(notify_trigger: bool, citus: bool) -> dict[str, str]:
    """Return the files to run, each with the condition that is true if its last statement has run."""
    if notify_trigger and citus:
        raise ValueError("notify_trigger and citus must not both be True: no reader listens on the workers of Citus")
    return _MIGRATIONS | (_NOTIFY_TRIGGER if notify_trigger else {}) | (_CITUS if citus else {})


def _render(tables: list[Table], files: dict[str, str]) -> str:
    by_default_name = dict(zip((CHUNKS_TABLE, STATUS_TABLE, CONVERSATIONS_TABLE), tables, strict=True))

    def replace_name(match: re.Match[str]) -> str:
        if match["channel"]:
            return quote(by_default_name[STATUS_TABLE].channel)  # the argument of a trigger may be an identifier
        if match["table"] is None:
            return match[0]
        return _render_name(by_default_name[match["table"]], match["suffix"] or "", match["lookup"], match["end"])

    # In one transaction with other changes of distributed tables, Citus creates no function without this setting.
    settings = "SET LOCAL citus.multi_shard_modify_mode = 'sequential';\n" if files.keys() & _CITUS.keys() else ""
    texts = (_NAMES.sub(replace_name, _with_free_tags(_read(name), tables)) for name in files)
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
    qualified = table.qualify(table.derive(suffix))
    if lookup:
        return lookup + _literal(qualified)
    # CREATE INDEX and CREATE TRIGGER use the schema of the table, and reject a qualified name. Functions need one.
    return (quote(table.derive(suffix)) if suffix and end != "(" else qualified) + end


def _as_one_statement(tables: list[Table], files: dict[str, str]) -> str:
    # One statement is one transaction with every driver and pooler. The lock serializes concurrent migrations, since
    # CREATE TABLE IF NOT EXISTS can fail if two of them create the same table. PostgreSQL checks the permissions of a
    # statement also if it has nothing to do.
    script = f"""
BEGIN
PERFORM pg_advisory_xact_lock(hashtext('aibind_postgres.schema.migrate'));
BEGIN
{_render(tables, files)}
EXCEPTION WHEN insufficient_privilege OR read_only_sql_transaction THEN
  IF ({_applied(tables, files.values())}) IS NOT TRUE THEN RAISE; END IF;
END;
END
"""
    tag = "$migrate$"
    while tag in script:
        tag = f"{tag[:-1]}_$"
    return f"DO {tag}{script}{tag}"


def _applied(tables: list[Table], conditions: Iterable[str]) -> str:
    """Return the condition that all files have run."""
    chunks, status, conversations = tables
    names = {
        "chunks": chunks.quoted,
        "status": status.quoted,
        "conversations": conversations.quoted,
        "expiry_index": conversations.qualify(conversations.derive("_expires_at_idx")),
        "time_index": conversations.qualify(conversations.derive("_updated_at_idx")),
        "trigger": status.derive("_notify_trigger"),
        "append": status.qualify(status.derive("_append")),
    }
    return " AND ".join(conditions).format_map({key: _literal(name) for key, name in names.items()})


def _literal(text: str) -> str:
    backslashes_doubled = text.replace("\\", "\\\\")
    return "E'" + backslashes_doubled.replace("'", "''") + "'"
