"""The minimal grants of docs/doctor.md: sufficient for all methods of the stores, and each of them is necessary."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import grants

from aibind_postgres import AibindError, AsyncPostgresConversationStore, AsyncPostgresStreamStore
from aibind_postgres._message_tree import new_id


@pytest.fixture
async def app(run_sql, schema_name):
    """The name of a role without rights."""
    name = f"{schema_name}_app"
    run_sql(f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'app'")
    yield name
    run_sql(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


@pytest.fixture
def names(schema_name, tables):
    """The names of the tables by their default names."""
    tables = {key: sql.Identifier(schema_name, key) for key in ("chunks", "status", "conversations")}
    return {
        grants.CHUNKS_TABLE: tables["chunks"],
        grants.ARCHIVE_TABLE: sql.Identifier(schema_name, "chunks_archive"),
        grants.STATUS_TABLE: tables["status"],
        grants.CONVERSATIONS_TABLE: tables["conversations"],
    }


@pytest.fixture
def granted(run_sql, app, schema_name, names):
    tables = {"chunks": "chunks", "archive": "chunks_archive", "status": "status", "conversations": "conversations"}
    run_sql(grants.statements(app, schema_name, **tables))
    [(database,)] = run_sql("SELECT current_database()").fetchall()
    run_sql(f'GRANT CONNECT ON DATABASE "{database}" TO "{app}"')


async def use_everything(dsn, tables, table):
    """Call the methods that read or change rows, on a new stream and new conversations."""
    options = {"table": table, "status_table": tables["status_table"]}
    async with (
        AsyncPostgresStreamStore(dsn, **tables, ttl=0.001) as streams,
        AsyncPostgresConversationStore(dsn, **options) as chats,
        AsyncPostgresConversationStore(dsn, **options, ttl=0.001) as brief,
    ):
        chat_id, owner = new_id(), new_id()
        for store, key, number in ((chats, chat_id, 1), (chats, chat_id, 2), (chats, "deleted", 1), (brief, owner, 1)):
            async with store.edit(key, owner=owner) as chat:
                chat.append({"id": f"{number}", "role": "user", "content": "text"})
        assert await chats.describe(chat_id, title="title")
        assert await chats.touch(chat_id)
        assert await chats.delete("deleted")
        assert await chats.cleanup() >= 1
        id = await streams.create(session_id=chat_id, owner=owner, metadata={}, lease=60)
        assert (await chats.get_info(chat_id)).active_stream_id == id
        async with streams.writer(id) as writer:
            await writer.write("text")
        assert [chunk.data async for chunk in streams.read_from(id)] == ["text"]
        assert (await streams.archive(0)).streams >= 1
        assert [chunk.data async for chunk in streams.read_with_times(id)] == ["text"]
        assert await streams.unarchive(id) == 1
        assert [info.id async for info in streams.list(owner=owner)] == [id]
        assert await streams.fail_abandoned(60) == []
        assert await chats.delete_owner(owner, streams=streams) == (1, 1)
        stopped = await streams.create()
        await streams.append_many(stopped, ["text"])
        assert await streams.stop(stopped)
        await streams.archive(0)
        assert (await streams.cleanup()).streams >= 1


@pytest.fixture
def use(admin_dsn, tables, names, app):
    """Use the stores as the role."""
    dsn = make_conninfo(admin_dsn, user=app, password="app")
    return lambda: use_everything(dsn, tables, names[grants.CONVERSATIONS_TABLE])


async def test_documented_grants_are_sufficient(use, granted):
    await use()


async def test_each_documented_grant_is_necessary(use, granted, run_sql, app, schema_name, names):
    unnecessary = []
    held = [(names[table], privilege) for table, each in grants.privileges().items() for privilege in each]
    assert len(held) >= 14
    for table, privilege in held:
        statement = sql.SQL(f"{{}} {privilege} ON {{}} {{}} {{}}")
        run_sql(statement.format(sql.SQL("REVOKE"), table, sql.SQL("FROM"), sql.Identifier(app)))
        try:
            await use()
        except (psycopg.errors.InsufficientPrivilege, AibindError):
            pass
        else:
            unnecessary.append((table, privilege))
        run_sql(statement.format(sql.SQL("GRANT"), table, sql.SQL("TO"), sql.Identifier(app)))
    assert unnecessary == []
    run_sql(sql.SQL("REVOKE USAGE ON SCHEMA {} FROM {}").format(sql.Identifier(schema_name), sql.Identifier(app)))
    with pytest.raises((psycopg.errors.InsufficientPrivilege, AibindError)):
        await use()
