"""The schema: the SQL of the migrations for given table names, and its application.

Every migration can be applied again without harm, and no table remembers which ones were.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ._async.client import as_client as as_async_client
from ._sync.client import as_client
from ._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table, distinct, quote

if TYPE_CHECKING:
    from psycopg.sql import Identifier
    from typing_extensions import Unpack

    from ._async.client import AsyncClientLike
    from ._sync.client import ClientLike

_PACKAGED = Path(__file__).parent / "sql"  # in an installed package; in a checkout the folder is at the top
SQL_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "sql"

# A comment, or one of the default table names with what may be derived from it: an index, a trigger, or, with a bracket
# behind it, a function. Comments are matched so that they stay as they are: a name may contain a line break.
_NAMES = re.compile(
    rf"--[^\n]*|\b(?P<table>{CHUNKS_TABLE}|{STATUS_TABLE}|{CONVERSATIONS_TABLE})(?P<suffix>_\w+)?\b(?P<call>\()?"
)


def render(
    *,
    chunks_table: str | Identifier = CHUNKS_TABLE,
    status_table: str | Identifier = STATUS_TABLE,
    conversations_table: str | Identifier = CONVERSATIONS_TABLE,
    notify_trigger: bool = False,
) -> str:
    """Return the SQL that creates or completes the schema, for psql, Alembic, Django, Flyway and the like.

    `notify_trigger` adds the optional trigger that announces for writers which don't, such as the TypeScript package.
    Raises `ValueError` for a table name that cannot be one.
    """
    chunks, status, conversations = distinct(chunks_table, status_table, conversations_table)
    tables = {CHUNKS_TABLE: chunks, STATUS_TABLE: status, CONVERSATIONS_TABLE: conversations}

    def named(match: re.Match[str]) -> str:
        if match["table"] is None:
            return match[0]
        return _name(tables[match["table"]], match["suffix"], match["call"])

    files = sorted(SQL_FOLDER.glob("*.sql"))
    if notify_trigger:
        files.append(SQL_FOLDER / "optional" / "notify_trigger.sql")
    return "\n".join(_NAMES.sub(named, file.read_text("utf-8")) for file in files)


class SchemaOptions(TypedDict, total=False):
    """What `render` takes, for those that pass it on."""

    chunks_table: str | Identifier
    status_table: str | Identifier
    conversations_table: str | Identifier
    notify_trigger: bool


def migrate(client: ClientLike, **options: Unpack[SchemaOptions]) -> None:
    """Apply what `render` gives for the same options: all of it or nothing.

    `client` is what a store takes. A connection that is inside a transaction gets the schema in that transaction. Safe
    to call again, and from many processes at once.
    """
    with as_client(client) as opened:
        opened.query(_as_one_statement(render(**options)), ())


async def async_migrate(client: AsyncClientLike, **options: Unpack[SchemaOptions]) -> None:
    """Do what `migrate` does, with what an asynchronous store takes."""
    async with as_async_client(client) as opened:
        await opened.query(_as_one_statement(render(**options)), ())


def _name(table: Table, suffix: str | None, call: str | None) -> str:
    if suffix is None:
        return table.quoted + (call or "")
    # An index and a trigger live where their table does, and must not name its schema; a function must.
    return table.qualify(table.derive(suffix)) + call if call else quote(table.derive(suffix))


def _as_one_statement(script: str) -> str:
    # One statement is one transaction through any driver and any pooler. The lock is for migrations that run at the
    # same time: CREATE TABLE IF NOT EXISTS can fail when two of them create the table.
    tag = "$migrate$"
    while tag in script:
        tag = f"{tag[:-1]}_$"
    lock = "PERFORM pg_advisory_xact_lock(hashtext('aibind_postgres.schema.migrate'));"
    return f"DO {tag} BEGIN\n{lock}\n{script}\nEND {tag}"
