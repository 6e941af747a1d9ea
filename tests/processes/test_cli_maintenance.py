"""The commands `cleanup`, `fail-abandoned` and `archive`, run as processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import psycopg
import pytest
from support import servers
from support.command_line import run, start

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore, schema


@pytest.fixture
def store(database: str) -> Iterator[PostgresStreamStore]:
    with PostgresStreamStore(database) as store:
        yield store


def expire_all(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE aibind_stream_status SET expires_at = 0")
        connection.execute("UPDATE aibind_conversations SET expires_at = 0")


def fill(dsn: str, store: PostgresStreamStore) -> None:
    for id in ("active", "done"):
        store.create(id)
        store.append_many(id, ["x", "y"])
    store.complete("done")
    with PostgresConversationStore(dsn) as conversations:
        conversations.save("chat", ChatHistory())
    expire_all(dsn)


def test_cleanup(database: str, store: PostgresStreamStore) -> None:
    fill(database, store)
    done = run("cleanup", dsn=database)
    assert (done.stdout, done.stderr, done.returncode) == (b"deleted streams: 1, chunks: 2, conversations: 1\n", b"", 0)
    assert [info.id for info in store.list()] == ["active"]
    done = run("cleanup", "--json", dsn=database)
    assert json.loads(done.stdout) == {"streams": 0, "chunks": 0, "conversations": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cleanup_in_a_loop(database: str, store: PostgresStreamStore, number: signal.Signals) -> None:
    with start("cleanup", "--every", "0.2s", "--json", dsn=database) as cleaner:
        assert cleaner.stdout is not None
        assert json.loads(cleaner.stdout.readline())["streams"] == 0
        fill(database, store)
        while not json.loads(cleaner.stdout.readline())["streams"]:
            pass
        cleaner.send_signal(number)
        _, errors = cleaner.communicate()
    assert (cleaner.returncode, errors) == (128 + number, b"")


def test_cleanup_in_a_loop_survives_an_outage() -> None:
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        with start("cleanup", "--every", "0.2s", dsn=server.dsn) as cleaner:
            assert cleaner.stdout is not None
            assert cleaner.stderr is not None
            assert cleaner.stdout.readline().startswith(b"deleted streams: 0")
            server.stop()
            assert b"aibind-postgres: cannot connect to PostgreSQL" in cleaner.stderr.readline()
            server.start()
            with PostgresStreamStore(server.dsn) as store:
                fill(server.dsn, store)
            while not cleaner.stdout.readline().startswith(b"deleted streams: 1"):
                assert cleaner.poll() is None
            cleaner.terminate()
            assert b"Traceback" not in cleaner.communicate()[1]
    assert cleaner.returncode == 143


def test_cleanup_refuses_a_period_that_is_too_long(database: str) -> None:
    done = run("cleanup", "--every", "99999999999d", dsn=database)
    assert (done.returncode, done.stdout) == (2, b"")


def test_cleanup_once_reports_an_unreachable_server() -> None:
    done = run("cleanup", dsn="postgresql://me:geheim@localhost:1/db")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"(host localhost, port 1, database db)" in done.stderr
    assert b"geheim" not in done.stderr


def test_fail_abandoned(database: str, store: PostgresStreamStore) -> None:
    for id in ("a", "b\nc", "living"):
        store.create(id)
        store.append(id, "x")
    with psycopg.connect(database) as connection:
        connection.execute(
            "UPDATE aibind_stream_chunks SET created_at = created_at - interval '20 minutes' WHERE id <> 'living'"
        )
    assert run("fail-abandoned", "--older-than", "30m", dsn=database).stdout == b""
    done = run("fail-abandoned", dsn=database)
    assert (sorted(done.stdout.splitlines()), done.returncode) == ([b"a", b"b\\nc"], 0)
    assert json.loads(run("fail-abandoned", "--older-than", "0s", "--json", dsn=database).stdout) == {"ids": ["living"]}
    assert {info.state for info in store.list()} == {"error"}


def test_archive(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append_many("x", ["a", "b"])
    store.complete("x")
    done = run("archive", dsn=database)
    assert done.stdout == b"archived streams: 0, chunks: 0\n"  # not older than a day
    done = run("archive", "--older-than", "0s", "--json", dsn=database)
    assert json.loads(done.stdout) == {"streams": 1, "chunks": 2}
    assert run("tail", "x", dsn=database).stdout == b"ab"
