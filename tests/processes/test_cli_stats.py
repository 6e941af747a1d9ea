"""The command `stats`, run in separate processes."""

from __future__ import annotations

import json
import threading
from typing import Any

import psycopg
import pytest
from support import servers
from support.concurrency import until
from support.exports import run

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore, schema


def stats(dsn: str, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("stats", "--json", *options, dsn=dsn).stdout)
    return found


def create_streams(dsn: str) -> None:
    with PostgresStreamStore(dsn) as store, PostgresConversationStore(dsn) as conversations:
        for name, count in (("a", 1), ("b", 2), ("c", 3), ("d", 0)):
            store.create(name)
            store.append_many(name, ["x"] * count)
        store.complete("b")
        store.fail("c", "x")
        store.archive(0)
        store.create("e")
        store.append("e", "x")
        store.complete("e")
        store.create("deleted")
        store.delete("deleted")
        conversations.save("chat", ChatHistory())
    with psycopg.connect(dsn) as admin:
        admin.execute("UPDATE aibind_stream_status SET created_at = now() - interval '90 seconds' WHERE id = 'b'")
        admin.execute("UPDATE aibind_stream_status SET created_at = now() - interval '2 hours' WHERE id = 'a'")
        admin.execute("UPDATE aibind_stream_status SET created_at = 'infinity' WHERE id = 'c'")
        admin.execute("UPDATE aibind_stream_status SET created_at = NULL WHERE id = 'd'")
        admin.execute(
            "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at) "
            "VALUES ('aibind_postgres.housekeeping', 'done', 7, 0), ('tombstone', 'deleted', 7, 0)"
        )
        admin.execute("INSERT INTO aibind_conversations (session_id, data, expires_at) VALUES ('expired', '', 0)")


def test_numbers(database):
    create_streams(database)
    found = stats(database)
    assert found["streams"] == {
        "active": {"streams": 2, "chunks": 1},
        "done": {"streams": 2, "chunks": 3},
        "error": {"streams": 1, "chunks": 3},
        "stopped": {"streams": 0, "chunks": 0},
    }
    assert found["total"] == {"streams": 5, "chunks": 7}
    assert found["archived_streams"] == 2
    assert found["created_in_last"] == {
        "minute": {"streams": 1, "chunks": 1},
        "hour": {"streams": 2, "chunks": 3},
        "day": {"streams": 3, "chunks": 4},
    }
    assert found["oldest_active_stream"]["id"] == "a"
    assert 7200 <= found["oldest_active_stream"]["age"] < 7800
    assert found["conversations"] == 1
    assert 0 <= found["notifications"]["queue_usage"] <= 1


@pytest.mark.parametrize("partitions", [None, 4, "time"])
def test_sizes_include_partitions_and_large_texts(empty_database, partitions):
    schema.migrate(empty_database, partitions=partitions)
    before = stats(empty_database)["tables"]
    assert set(before) == {
        "aibind_stream_chunks",
        "aibind_stream_status",
        "aibind_stream_chunks_archive",
        "aibind_conversations",
    }
    with PostgresStreamStore(empty_database) as store:
        store.create("a")
        store.append_many("a", [str(list(range(n, n + 30_000))) for n in range(3)])  # compressed, but out of line
    after = stats(empty_database)["tables"]["aibind_stream_chunks"]
    assert after["table_bytes"] > before["aibind_stream_chunks"]["table_bytes"] + 100_000
    assert after["index_bytes"] > 0


def test_listening_stores(database):
    with PostgresStreamStore(database) as store:
        store.create("a")
        reader = store.read_from("a")
        assert stats(database)["notifications"]["listening_stores"] == 0
        store.append("a", "x")
        next(reader)
        thread = threading.Thread(target=lambda: list(reader))
        thread.start()
        until(lambda: stats(database)["notifications"]["listening_stores"] == 1)
        store.complete("a")
        thread.join()


def test_text(database):
    create_streams(database)
    done = run("stats", dsn=database)
    assert b"\x1b" not in done.stdout
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert ["done", "2", "3"] in lines
    assert ["of", "the", "last", "day", "3", "4"] in lines
    assert ["oldest", "active", "stream:", "a"] in [line[:4] for line in lines]
    assert [line[1:] for line in lines if line[:1] == ["aibind_stream_status"]]


def test_other_table_names(empty_database):
    names = {"chunks_table": '%s "chunks"', "status_table": "{status} 100%", "conversations_table": "chats %(id)s"}
    schema.migrate(empty_database, **names)
    options = [part for name, table in names.items() for part in (f"--{name.replace('_', '-')}", table)]
    assert names["status_table"] in stats(empty_database, *options)["tables"]


def test_empty_tables(database):
    found = stats(database)
    nothing = {"streams": 0, "chunks": 0}
    assert found["streams"] == dict.fromkeys(("active", "done", "error", "stopped"), nothing)
    assert (found["total"], found["oldest_active_stream"]) == (nothing, None)
    assert b"oldest active stream:  -" in run("stats", dsn=database).stdout


def test_tables_of_the_typescript_package(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as admin:
        admin.execute((schema.SQL_FOLDER / "0001_tables.sql").read_text("utf-8").encode())
        admin.execute("INSERT INTO aibind_stream_status VALUES ('a', 'done', NULL, 1, 5)")
    found = stats(empty_database)
    assert (found["total"], found["archived_streams"], found["created_in_last"]["day"]) == (
        {"streams": 1, "chunks": 1},
        None,
        None,
    )
    run("stats", dsn=empty_database)


def test_missing_tables_name_migrate(empty_database):
    assert b"aibind-postgres migrate" in run("stats", dsn=empty_database, code=1).stderr


def test_hot_standby():
    with servers.own_server() as primary:
        schema.migrate(primary.dsn)
        create_streams(primary.dsn)
        with servers.standby_of(primary) as standby:
            assert stats(standby.dsn)["total"] == {"streams": 5, "chunks": 7}
