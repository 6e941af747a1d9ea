"""The command `export`, run in separate processes."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import time
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import pgbouncer, servers
from support.command_line import COMMAND, environment
from support.concurrency import until
from support.exports import (
    HOSTILE,
    create_long_stream,
    create_samples,
    export,
    peak_memory,
    run,
    start,
)
from support.terminal import run_on_terminal

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore, schema
from aibind_postgres.cli.expected_tables import read_migrations
from aibind_postgres.cli.export_format import COLUMNS


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.split(b"\n") if line]


def ids(content: bytes) -> list[str]:
    return [line["id"] for line in lines(content) if line["type"] == "stream"]


@pytest.fixture
def store(database):
    with PostgresStreamStore(database) as store:
        yield store


@pytest.fixture
def admin(database):
    with psycopg.connect(database, autocommit=True) as admin:
        yield admin


def test_every_column_of_the_migrations_is_exported():
    tables = {"stream": "aibind_stream_status", "chunk": "aibind_stream_chunks", "conversation": "aibind_conversations"}
    columns = read_migrations().columns
    for kind, table in tables.items():
        expected = {column.name for column in columns if column.table == table}
        assert set(COLUMNS[kind]) == expected - {"lease_until", "archived_at"}


def test_lines_of_a_stream(database, store, admin):
    store.create("a", owner="ann", session_id="chat", metadata={"n": 1}, ttl=60, lease=60)
    store.append_many("a", ["x", "\u2028\n"])
    store.complete("a")
    admin.execute("UPDATE aibind_stream_status SET created_at = '2026-11-30 12:00:00.5+02', expires_at = 17")
    admin.execute("UPDATE aibind_stream_chunks SET created_at = '2026-11-30 12:00:01+02'")
    content = export(database, "a")
    assert lines(content) == [
        {"type": "header", "format": "aibind-postgres", "version": 1},
        {
            "type": "stream",
            "id": "a",
            "state": "done",
            "total_chunks": 2,
            "expires_at": 17,
            "created_at": "2026-11-30T10:00:00.5+00:00",
            "session_id": "chat",
            "owner": "ann",
            "ttl_ms": 60_000,
            "metadata": {"n": 1},
        },
        {"type": "chunk", "id": "a", "seq": 1, "data": "x", "created_at": "2026-11-30T10:00:01+00:00"},
        {"type": "chunk", "id": "a", "seq": 2, "data": "\u2028\n", "created_at": "2026-11-30T10:00:01+00:00"},
        {"type": "end", "streams": 1, "chunks": 2, "conversations": 0},
    ]
    assert content.count(b"\n") == 5


def test_hostile_texts(database):
    create_samples(database)
    found = lines(export(database))
    texts: dict[str, list[str]] = {}
    for line in found:
        if line["type"] == "chunk":
            texts.setdefault(line["id"], []).append(line["data"])
    for number, text in enumerate(HOSTILE):
        assert texts[f"{number} {text}"] == HOSTILE
    assert ids(export(database)) == sorted(ids(export(database)))  # by code points in all collations
    assert [line["owner"] for line in found if line.get("owner") == f"ann {HOSTILE[3]}"]


def test_selections(database, store):
    with PostgresConversationStore(database) as conversations:
        conversations.save("chat of ann", ChatHistory(), owner="ann")
    store.create("of ann", owner="ann")
    store.create("of ann's chat", session_id="chat of ann")
    store.create("of ben in ann's chat", session_id="chat of ann", owner="ben")
    store.create("of nobody", session_id="another chat")
    store.create("deleted")
    store.delete("deleted")
    assert ids(export(database, "--owner", "ann")) == ["of ann", "of ann's chat"]
    assert ids(export(database, "of ann")) == ["of ann"]
    assert len(ids(export(database, "--all"))) == 4
    assert lines(export(database, "--owner", "nobody"))[1:] == [
        {"type": "end", "streams": 0, "chunks": 0, "conversations": 0}
    ]


def test_housekeeping_rows_are_not_exported(database, admin):
    admin.execute(
        "INSERT INTO aibind_stream_status (id, state, error, total_chunks, expires_at) "
        "VALUES ('x deleted', 'deleted', 'x', 5, 9e18), ('aibind_postgres.housekeeping', 'done', NULL, 0, 0)"
    )
    assert ids(export(database)) == []


def test_chunks_left_over_of_a_deleted_stream_are_not_exported(database, store, admin):
    store.create("a")
    store.append("a", "x")
    admin.execute("INSERT INTO aibind_stream_chunks (id, seq, data) VALUES ('a', 2, 'left'), ('b', 1, 'left')")
    assert [line["data"] for line in lines(export(database)) if line["type"] == "chunk"] == ["x"]


def test_archived_streams_give_the_same_file(database, store):
    create_samples(database)
    create_long_stream(database, 2500)
    before = export(database)
    store.archive(0, batch_size=1300)
    assert export(database) == before
    with psycopg.connect(database) as admin:
        row = admin.execute("SELECT count(*) FROM aibind_stream_chunks_archive").fetchone()
        assert row is not None
        assert row[0] > 3
        # Other software has stored an archived chunk again.
        admin.execute("INSERT INTO aibind_stream_chunks (id, seq, data) VALUES ('long', 7, 'again')")
    assert export(database) == before


def test_partly_archived_stream(database, admin):
    create_long_stream(database, 25_000)
    before = export(database)
    with PostgresStreamStore(database) as store:
        next(iter(store._archive.steps(0, 10_000)))
    assert admin.execute("SELECT count(*) FROM aibind_stream_chunks").fetchone() == (15_000,)
    assert export(database) == before


def test_other_table_names(empty_database, tmp_path):
    names = {"chunks_table": '%s "chunks"', "status_table": "{status} 100%", "conversations_table": "chats %(id)s"}
    options = [part for name, table in names.items() for part in (f"--{name.replace('_', '-')}", table)]
    schema.migrate(empty_database, **names)
    tables = {name: names[name] for name in ("chunks_table", "status_table")}
    with (
        PostgresStreamStore(empty_database, **tables) as store,
        PostgresConversationStore(empty_database, table=names["conversations_table"]) as conversations,
    ):
        conversations.save("chat", ChatHistory(), owner="ann")
        store.create("a", owner="ann")
        store.append("a", "x")
        store.complete("a")
        store.archive(0)
        files = tmp_path / "streams", tmp_path / "conversations"
        run("export", "--owner", "ann", files[0], *options, dsn=empty_database)
        run("conversations", "export", "--all", files[1], *options[4:], dsn=empty_database)
        contents = [file.read_bytes() for file in files]
        assert [line["type"] for line in lines(contents[0])] == ["header", "stream", "chunk", "end"]
        conversations.delete_owner("ann", streams=store)
        for file in files:
            run("import", file, *options, dsn=empty_database)
        assert [chunk.data for chunk in store.read_from("a")] == ["x"]
        assert conversations.get_info("chat") is not None


# The file


def test_file_and_standard_output_have_the_same_bytes(database, tmp_path):
    create_samples(database)
    content = export(database)
    done = run("export", "--all", tmp_path / "x.jsonl", dsn=database)
    assert (tmp_path / "x.jsonl").read_bytes() == content
    assert done.stdout == b""
    assert b"15 streams with 127 chunks exported to " in done.stderr
    assert b"\x1b" not in done.stderr
    assert (tmp_path / "x.jsonl").stat().st_mode & 0o777 == 0o600
    run("export", "--all", tmp_path / "x.jsonl.gz", dsn=database)
    done = run("export", "--all", tmp_path / "y.jsonl.gz", "--json", dsn=database)
    assert (json.loads(done.stdout), done.stderr) == ({"streams": 15, "chunks": 127, "conversations": 0}, b"")
    assert b"--json needs the name of a file" in run("export", "--all", "-", "--json", dsn=database, code=2).stderr
    assert gzip.decompress((tmp_path / "x.jsonl.gz").read_bytes()) == content
    assert (tmp_path / "x.jsonl.gz").read_bytes() == (tmp_path / "y.jsonl.gz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("end", ["terminated backend", "SIGTERM", "SIGINT"])
def test_interrupted_export_leaves_the_old_file(database, store, admin, tmp_path, end):
    store.create("a")
    file = tmp_path / "x.jsonl"
    file.write_text("old")
    with psycopg.connect(database) as other, start("export", "--all", file, dsn=database) as process:
        other.execute("LOCK TABLE aibind_stream_chunks")
        waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        until(lambda: admin.execute(waiting).fetchone())
        assert (tmp_path / "x.jsonl.partial").exists()
        if end == "terminated backend":
            admin.execute(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS waiting")
        else:
            process.send_signal(getattr(signal, end))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == {"terminated backend": 1, "SIGTERM": 143, "SIGINT": 130}[end]
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert file.read_text() == "old"


def test_file_that_another_export_writes(database, tmp_path):
    (tmp_path / "x.jsonl.partial").write_text("")
    done = run("export", "--all", tmp_path / "x.jsonl", dsn=database, code=2)
    assert b"another export is writing it, or was killed" in done.stderr
    assert (tmp_path / "x.jsonl.partial").exists()


def test_symbolic_link_to_the_file(database, tmp_path):
    (tmp_path / "link").symlink_to("x.jsonl")
    run("export", "--all", tmp_path / "link", dsn=database)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "x.jsonl").is_file()


def test_unusable_names(database, tmp_path):
    assert b"is not a file" in run("export", "--all", tmp_path, dsn=database, code=2).stderr
    assert b"No such file" in run("export", "--all", tmp_path / "no" / "x", dsn=database, code=1).stderr


def test_full_disk_is_named(database, store):
    store.create("a")
    store.append_many("a", ["x" * 100_000] * 3)
    done = run("export", "--all", "-", dsn=database)
    assert len(done.stdout) > 300_000
    with open("/dev/full", "wb") as full:
        failed = subprocess.run(
            [*COMMAND, "export", "--all", "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(database),
            check=False,
        )
    assert failed.returncode == 1
    assert b"No space left on device" in failed.stderr
    assert b"Traceback" not in failed.stderr


def test_wrong_usage(database, tmp_path):
    file = str(tmp_path / "x")
    for arguments in ([file], ["a", "--all", file], ["--all", "--owner", "ann", file], ["a", "b", file], []):
        assert run("export", *arguments, dsn=database, code=2).stdout == b""
    done = run("export", "missing", file, dsn=database, code=3)
    assert b"'missing' not found" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert b"no database" in run("export", "--all", file, dsn=None, code=2).stderr


def test_progress_bar_on_a_terminal(database, tmp_path):
    create_samples(database)
    code, shown = run_on_terminal("export", "--all", str(tmp_path / "x"), dsn=database)
    assert code == 0
    assert "exporting" in shown
    assert "100%" in shown
    code, shown = run_on_terminal("export", "--all", "-", dsn=database)
    assert "exporting" not in shown


# The database


def test_export_is_one_snapshot(database, store, admin):
    create_long_stream(database, 60_000)
    store.create("zzz")
    store.append("zzz", "x")
    before = export(database)
    with start("export", "--all", "-", dsn=database) as process:
        assert process.stdout is not None
        begin = process.stdout.readline()  # the pipe is smaller than the export
        store.append("zzz", "y")
        store.create("zzzz")
        admin.execute("DELETE FROM aibind_stream_chunks WHERE id = 'long'")
        rest = process.stdout.read()  # not `communicate`, which loses what `readline` has buffered
    assert process.returncode == 0
    assert begin + rest == before


def test_partitions_are_locked_before_the_snapshot(empty_database):
    schema.migrate(empty_database, partitions=4)
    create_long_stream(empty_database, 60_000)
    with start("export", "--all", "-", dsn=empty_database) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with psycopg.connect(empty_database) as admin:
            locked = admin.execute(
                "SELECT count(DISTINCT relation) FROM pg_locks, pg_partition_tree('aibind_stream_chunks') AS part "
                "WHERE relation = part.relid AND pid <> pg_backend_pid()"
            )
            assert locked.fetchone() == (5,)
        process.communicate(timeout=60)


@pytest.mark.skipif(pgbouncer.BINARY is None, reason="needs PgBouncer")
def test_transaction_pooling(database, empty_database, tmp_path):
    create_samples(database)
    schema.migrate(empty_database)
    with pgbouncer.pgbouncer(database, tmp_path, pool_mode="transaction") as dsn:
        run("export", "--all", tmp_path / "x", dsn=dsn)
    assert (tmp_path / "x").read_bytes() == export(database)
    (tmp_path / "target").mkdir()
    with pgbouncer.pgbouncer(empty_database, tmp_path / "target", pool_mode="transaction") as dsn:
        run("import", tmp_path / "x", dsn=dsn)
        run("import", tmp_path / "x", "--resume", dsn=dsn)
    assert export(empty_database) == (tmp_path / "x").read_bytes()


def test_closed_pipe(database):
    create_long_stream(database, 60_000)
    with start("export", "--all", "-", dsn=database) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")


def test_memory_does_not_grow_with_the_stream(database, tmp_path):
    create_long_stream(database, 100)
    small = peak_memory("export", "--all", tmp_path / "small.jsonl", dsn=database)
    with psycopg.connect(database) as admin:
        admin.execute("DELETE FROM aibind_stream_chunks; DELETE FROM aibind_stream_status")
    create_long_stream(database, 100_000)
    assert peak_memory("export", "--all", tmp_path / "large.jsonl.gz", dsn=database) < 1.25 * small


def test_limits_of_the_role_do_not_end_an_export(database, store):
    store.create("a")
    create_long_stream(database, 60_000)
    options = "-c statement_timeout=2s -c idle_in_transaction_session_timeout=100"
    with start("export", "--all", "-", dsn=make_conninfo(database, options=options)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)  # longer than the session may be idle
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")


def test_hot_standby():
    with servers.own_server() as primary:
        schema.migrate(primary.dsn)
        create_samples(primary.dsn)
        with servers.standby_of(primary) as standby:
            assert export(standby.dsn) == export(primary.dsn)
            assert ids(export(standby.dsn, "--owner", f"ann {HOSTILE[2]}")) == [f"2 {HOSTILE[2]}"]


def test_missing_tables_name_migrate(empty_database, tmp_path):
    done = run("export", "--all", tmp_path / "x", dsn=empty_database, code=1)
    assert b"create it with `aibind-postgres migrate`" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_tables_of_the_typescript_package(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as admin:
        admin.execute((schema.SQL_FOLDER / "0001_tables.sql").read_text("utf-8").encode())
        admin.execute("INSERT INTO aibind_stream_status VALUES ('a', 'done', NULL, 1, 5)")
        admin.execute("INSERT INTO aibind_stream_chunks VALUES ('a', 1, 'x')")
    assert lines(export(empty_database))[1:3] == [
        {"type": "stream", "id": "a", "state": "done", "total_chunks": 1, "expires_at": 5},
        {"type": "chunk", "id": "a", "seq": 1, "data": "x"},
    ]
    done = run("export", "--owner", "ann", "-", dsn=empty_database, code=1)
    assert b"migrate" in done.stderr


def test_role_with_select_only(database, store, admin):
    store.create("a")
    store.append("a", "x")
    role = f"role_{os.urandom(6).hex()}"
    admin.execute(f"CREATE ROLE {role} LOGIN")
    try:
        refused = run("export", "--all", "-", dsn=make_conninfo(database, user=role), code=1)
        assert re.search(rb"permission denied for table \w+", refused.stderr)
        admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        assert ids(export(make_conninfo(database, user=role))) == ["a"]
        admin.execute("ALTER TABLE aibind_stream_chunks ENABLE ROW LEVEL SECURITY")
        hidden = run("export", "--all", "-", dsn=make_conninfo(database, user=role), code=1)
        assert b"row-level security" in hidden.stderr
    finally:
        admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
