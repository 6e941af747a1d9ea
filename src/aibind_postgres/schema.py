"""Render the migrations for given table names, and apply them.

All migrations are idempotent, so applied migrations are not recorded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ._async.client import as_client as as_async_client
from ._sync.client import as_client
from ._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table, parse_distinct, quote

if TYPE_CHECKING:
    from psycopg.sql import Identifier
    from typing_extensions import Unpack

    from ._async.client import AsyncClientLike
    from ._sync.client import ClientLike

_PACKAGED = Path(__file__).parent / "sql"  # in an installed package; in a checkout, the folder is at the top level
SQL_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "sql"

# Matches the default table names and the names derived from them: indexes, triggers and, with a parenthesis, functions.
# In single quotes, the name of the status table is the channel. Comments are matched to skip them, since a table name
# with a line break would end the comment.
_NAMES = re.compile(
    rf"--[^\n]*|'(?P<channel>{STATUS_TABLE})'|"
    rf"\b(?P<table>{CHUNKS_TABLE}|{STATUS_TABLE}|{CONVERSATIONS_TABLE})(?P<suffix>_\w+)?\b(?P<call>\()?"
)


def render(
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
) -> str:
    """Return the SQL that creates or updates the schema, for tools such as psql, Alembic, Django and Flyway.

    Args:
        chunks_table: The name of the chunks table; `aibind_stream_chunks` by default.
        status_table: The name of the status table; `aibind_stream_status` by default.
        conversations_table: The name of the conversations table; `aibind_conversations` by default.
        notify_trigger: Whether to add a trigger that notifies readers when other software writes, such as the
            TypeScript package; False by default.

    Returns:
        The SQL text.

    Raises:
        ValueError: A table name is invalid, or two names are the same.
        TypeError: A table name is neither a str nor an `Identifier`.

    Example:
        >>> sql = render(status_table="chat.status", chunks_table="chat.chunks")
    """
    chunks, status, conversations = parse_distinct(chunks_table, status_table, conversations_table)
    tables = {CHUNKS_TABLE: chunks, STATUS_TABLE: status, CONVERSATIONS_TABLE: conversations}

    def replace_name(match: re.Match[str]) -> str:
        if match["channel"]:
            return quote(status.channel)  # the argument of a trigger may be an identifier
        if match["table"] is None:
            return match[0]
        return _render_name(tables[match["table"]], match["suffix"], match["call"])

    files = sorted(SQL_FOLDER.glob("*.sql"))
    if notify_trigger:
        files.append(SQL_FOLDER / "optional" / "notify_trigger.sql")
    return "\n".join(_NAMES.sub(replace_name, file.read_text("utf-8")) for file in files)


class SchemaOptions(TypedDict, total=False):
    """The keyword arguments of `render`."""

    chunks_table: str | Identifier
    status_table: str | Identifier
    conversations_table: str | Identifier
    notify_trigger: bool


def migrate(client: ClientLike, **options: Unpack[SchemaOptions]) -> None:
    """Create or update the schema in one transaction. Safe to repeat, and to run in several processes at once.

    Args:
        client: A client, as for a store. If it is a connection inside a transaction, the schema is created in that
            transaction.
        **options: The options of `render`.

    Raises:
        ValueError: A table name is invalid, or two names are the same.
        TypeError: A table name is neither a str nor an `Identifier`.

    Example:
        >>> migrate("postgresql://localhost/app")  # doctest: +SKIP
    """
    with as_client(client) as opened:
        opened.query(_as_one_statement(render(**options)), ())


async def async_migrate(client: AsyncClientLike, **options: Unpack[SchemaOptions]) -> None:
    """Create or update the schema, as `migrate` does, with an asynchronous client.

    Args:
        client: A client, as for an asynchronous store.
        **options: The options of `render`.

    Raises:
        ValueError: A table name is invalid, or two names are the same.
        TypeError: A table name is neither a str nor an `Identifier`.
    """
    async with as_async_client(client) as opened:
        await opened.query(_as_one_statement(render(**options)), ())


def _render_name(table: Table, suffix: str | None, call: str | None) -> str:
    if suffix is None:
        return table.quoted + (call or "")
    # CREATE INDEX and CREATE TRIGGER use the schema of the table, and reject a qualified name. Functions need one.
    return table.qualify(table.derive(suffix)) + call if call else quote(table.derive(suffix))


def _as_one_statement(script: str) -> str:
    # One statement is one transaction with every driver and pooler. The lock serializes concurrent migrations, since
    # CREATE TABLE IF NOT EXISTS can fail if two of them create the same table.
    tag = "$migrate$"
    while tag in script:
        tag = f"{tag[:-1]}_$"
    lock = "PERFORM pg_advisory_xact_lock(hashtext('aibind_postgres.schema.migrate'));"
    return f"DO {tag} BEGIN\n{lock}\n{script}\nEND {tag}"
