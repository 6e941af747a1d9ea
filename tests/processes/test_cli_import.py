"""The command `import`, run in separate processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import servers
from support.concurrency import until
from support.exports import HOSTILE, create_long_stream, create_samples, export, peak_memory, run, start

from aibind_postgres import PostgresStreamStore, schema
from aibind_postgres.cli.export_format import Counts, end_line, header_line, line_of


@pytest.fixture
def target(server, template):
    """The database to import into."""
    with servers.own_database(server, template) as dsn:
        yield dsn


def count(dsn: str) -> int:
    with psycopg.connect(dsn) as admin:
        row = admin.execute(
            "SELECT (SELECT count(*) FROM aibind_stream_status) + (SELECT count(*) FROM aibind_stream_chunks)"
        ).fetchone()
        assert row is not None
        return int(row[0])


def file_of(folder: Path, *lines: bytes) -> Path:
    file = folder / "x.jsonl"
    file.write_bytes(b"".join(lines))
    return file


def stream(id: str, **columns: Any) -> bytes:
    return line_of("stream", {"id": id, "state": "done", "total_chunks": 0, "expires_at": 9 * 10**12, **columns})


HEADER = header_line()
END = end_line(Counts(streams=1))


@pytest.mark.parametrize(("partitions", "suffix"), [(None, ""), (4, ".gz"), ("time", "")])
def test_round_trip(database, empty_database, tmp_path, partitions, suffix):
    create_samples(database)
    create_long_stream(database, 12_000)
    schema.migrate(empty_database, partitions=partitions)
    file = tmp_path / f"x{suffix}"
    run("export", "--all", file, dsn=database)
    done = run("import", file, dsn=empty_database)
    assert b"16 streams with 12127 chunks and 0 conversations imported" in done.stderr
    assert b"\x1b" not in done.stderr
    content = gzip.decompress(file.read_bytes()) if suffix else file.read_bytes()
    assert export(empty_database) == content
    with PostgresStreamStore(empty_database) as store:
        store.archive(0)  # imported streams may be archived
        assert [chunk.data for chunk in store.read_from(f"3 {HOSTILE[3]}")] == HOSTILE
    assert export(empty_database) == content


def test_example_of_the_page(target, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_bytes()
    example = page.partition(b"```json\n")[2].partition(b"```")[0]
    run("import", file_of(tmp_path, example), dsn=target)
    assert export(target) == example


def test_stream_that_was_active_has_ended(database, target, tmp_path):
    with PostgresStreamStore(database) as store:
        store.create("a", lease=60, owner="ann")
        store.append("a", "x")
    run("export", "--all", tmp_path / "x", dsn=database)
    run("import", tmp_path / "x", dsn=target)
    with PostgresStreamStore(target) as store:
        error = "unfinished: it was still being written when it was exported"
        assert store.get_status("a") == ("error", error, 1)
        info = store.get_info("a")
        assert info is not None
        assert (info.owner, info.lease_until) == ("ann", None)
    assert b"imported; 1 existed already" in run("import", tmp_path / "x", "--resume", dsn=target).stderr


# Refused before anything is written


def test_existing_ids(database, target, tmp_path):
    with PostgresStreamStore(database) as store:
        for number in range(8):
            store.create(f"{number}")
            store.complete(f"{number}")
    with PostgresStreamStore(target) as store:
        for number in (2, 3, 5, 7):
            store.create(f"{number}")
    run("export", "--all", tmp_path / "x", dsn=database)
    done = run("import", tmp_path / "x", dsn=target, code=2)
    assert b"nothing was imported: these streams exist: '2', '3', '5' and more\n" in done.stderr
    assert count(target) == 4


def test_resume_refuses_streams_that_differ(database, target, tmp_path):
    create_samples(database)
    file = tmp_path / "x"
    run("export", "--all", file, dsn=database)
    run("import", file, dsn=target)
    before = count(target)
    for change in ("total_chunks = total_chunks + 1", "created_at = created_at + interval '1 microsecond'"):
        with psycopg.connect(target) as admin:
            admin.execute(f"UPDATE aibind_stream_status SET {change} WHERE id LIKE '3 %'".encode())
        done = run("import", file, "--resume", dsn=target, code=2)
        assert b"nothing was imported: these streams exist and differ from those of the file: '3 " in done.stderr
    assert count(target) == before


def test_chunks_left_over_of_a_deleted_stream(target, tmp_path):
    with psycopg.connect(target) as admin:
        admin.execute("INSERT INTO aibind_stream_chunks (id, seq, data) VALUES ('a', 1, 'left')")
    done = run("import", file_of(tmp_path, HEADER, stream("a"), END), dsn=target, code=2)
    assert b"there are chunks of the stream 'a', which was deleted" in done.stderr


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b""], "line 1: the end of the export is missing"),
        ([HEADER, stream("a")], "line 3: the end of the export is missing"),
        ([HEADER, stream("a", expires_at=10**30), END], "line 2: PostgreSQL refuses it: "),
        ([HEADER, stream("a", total_chunks=3_000_000_000), END], "line 2: PostgreSQL refuses it: "),
        ([HEADER, stream("a", created_at="some day"), END], "line 2: PostgreSQL refuses it: "),
        ([HEADER, stream("a"), stream("b", created_at="x"), end_line(Counts(2))], "line 3: PostgreSQL refuses it: "),
        ([HEADER, stream("a", error="\0"), END], "line 2: error contains a NUL character"),
        ([HEADER, stream("a", metadata={"x": ["\0"]}), END], "line 2: metadata contains a NUL character"),
    ],
)
def test_malformed_file(target, tmp_path, lines, message):
    done = run("import", file_of(tmp_path, *lines), dsn=target, code=2)
    assert message in done.stderr.decode()
    assert b"--resume" not in done.stderr
    assert count(target) == 0


def test_malformed_time_of_a_chunk_after_many_others(target, tmp_path):
    many = [
        line_of("chunk", {"id": "a", "seq": seq, "data": "x", "created_at": "infinity"}) for seq in range(1, 10_002)
    ]
    last = line_of("chunk", {"id": "b", "seq": 1, "data": "x", "created_at": "2026-11-31T10:00:00+00:00"})
    end = end_line(Counts(streams=2, chunks=10_002))
    file = file_of(tmp_path, HEADER, stream("a", total_chunks=10_001), *many, stream("b", total_chunks=1), last, end)
    done = run("import", file, dsn=target, code=2)
    assert b"line 10005: PostgreSQL refuses it: date/time field value out of range" in done.stderr
    assert count(target) == 0


def test_damaged_compressed_file(database, target, tmp_path):
    create_long_stream(database, 20_000)
    file = tmp_path / "x.gz"
    run("export", "--all", file, dsn=database)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert b"the compressed file is cut off" in run("import", file, dsn=target, code=2).stderr
    file.write_bytes(content[:-8] + bytes(8))  # without its checksum
    assert b": the compressed file is damaged" in run("import", file, dsn=target, code=2).stderr
    assert count(target) == 0


def test_unusable_files(target, tmp_path):
    assert b"No such file" in run("import", tmp_path / "x", dsn=target, code=1).stderr
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    assert b"cannot read a pipe" in run("import", tmp_path / "pipe", dsn=target, code=2).stderr
    os.close(descriptor)


def test_missing_tables_name_migrate(empty_database, tmp_path):
    file = file_of(tmp_path, HEADER, stream("a"), END)
    assert b"create it with `aibind-postgres migrate`" in run("import", file, dsn=empty_database, code=1).stderr
    with psycopg.connect(empty_database, autocommit=True) as admin:
        admin.execute((schema.SQL_FOLDER / "0001_tables.sql").read_text("utf-8").encode())
    done = run("import", file, dsn=empty_database, code=1)
    assert b"has no column created_at: create it with `aibind-postgres migrate`" in done.stderr


def test_read_only_server(target, tmp_path):
    file = file_of(tmp_path, HEADER, stream("a"), END)
    dsn = psycopg.conninfo.make_conninfo(target, options="-c default_transaction_read_only=on")
    assert b"read-only transaction" in run("import", file, dsn=dsn, code=1).stderr


# Interruptions


BLOCK = """
CREATE FUNCTION block() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  PERFORM pg_advisory_lock(1);
  RETURN NEW;
END $$;
CREATE TRIGGER block BEFORE INSERT ON aibind_stream_status FOR EACH ROW WHEN (NEW.id = 'long') EXECUTE FUNCTION block();
"""
WAITING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"


def interrupt(dsn: str, file: Path, end: Callable[[psycopg.Connection, Any], None]) -> tuple[int, bytes]:
    """Interrupt an import before the stream `long`, after the transactions before it."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(BLOCK)
        admin.execute("SELECT pg_advisory_lock(1)")
        with start("import", file, dsn=dsn) as process:
            until(lambda: admin.execute(WAITING).fetchone())
            end(admin, process)
            _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
    return process.returncode, errors


def create_streams(dsn: str) -> None:
    """Create streams with more chunks than two transactions of an import, and one called `long` after them."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at) "
            "SELECT 'a' || n, 'done', 100, 9e12 FROM generate_series(1, 250) AS n"
        )
        admin.execute(
            "INSERT INTO aibind_stream_chunks (id, seq, data) "
            "SELECT 'a' || n, m, 'x' FROM generate_series(1, 250) AS n, generate_series(1, 100) AS m"
        )
    create_long_stream(dsn, 100)


def terminate(admin: psycopg.Connection, process: Any) -> None:
    admin.execute(f"SELECT pg_terminate_backend(pid) FROM ({WAITING}) AS waiting".encode())


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (terminate, 1),
        (lambda admin, process: process.send_signal(signal.SIGINT), 130),
        (lambda admin, process: process.send_signal(signal.SIGTERM), 143),
        (lambda admin, process: process.kill(), -signal.SIGKILL),
    ],
    ids=["terminated backend", "SIGINT", "SIGTERM", "SIGKILL"],
)
def test_interrupted_import_is_continued(database, target, tmp_path, end, code):
    create_streams(database)
    file = tmp_path / "x"
    run("export", "--all", file, dsn=database)
    found, errors = interrupt(target, file, end)
    assert found == code
    assert b"repeat the command with --resume" in errors or code == -signal.SIGKILL
    with psycopg.connect(target, autocommit=True) as admin:
        admin.execute(f"SELECT pg_terminate_backend(pid) FROM ({WAITING}) AS waiting")
        admin.execute("DROP FUNCTION block CASCADE")
        rows = admin.execute(
            "SELECT total_chunks, (SELECT count(*) FROM aibind_stream_chunks WHERE id = s.id) "
            "FROM aibind_stream_status AS s"
        ).fetchall()
    assert 100 < len(rows) < 251
    assert set(rows) == {(100, 100)}  # whole streams only
    assert b"exist: 'a1', 'a10', 'a100' and more; --resume" in run("import", file, dsn=target, code=2).stderr
    result = json.loads(run("import", file, "--resume", "--json", dsn=target).stdout)
    assert result == {
        "streams": 251 - len(rows),
        "chunks": 25_100 - 100 * len(rows),
        "conversations": 0,
        "skipped": len(rows),
    }
    assert export(target) == file.read_bytes()


def test_file_that_changes_meanwhile(target, tmp_path):
    large = "x" * 1_500_000  # larger than all buffers
    long = [
        HEADER,
        stream("long", metadata=large, total_chunks=1),
        line_of("chunk", {"id": "long", "seq": 1, "data": large}),
    ]
    file = file_of(tmp_path, *long, end_line(Counts(1, 1)))

    def change(admin: psycopg.Connection, process: Any) -> None:
        file_of(tmp_path, *long, stream("z"), end_line(Counts(2, 1)))
        admin.execute("SELECT pg_advisory_unlock(1)")

    code, errors = interrupt(target, file, change)
    assert code == 2
    assert b"the file was changed while it was read" in errors
    assert count(target) == 0


def test_killed_server(tmp_path):
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        create_streams(server.dsn)
        file = tmp_path / "x"
        run("export", "--all", file, dsn=server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as admin:
            admin.execute("TRUNCATE aibind_stream_status, aibind_stream_chunks, aibind_stream_chunks_archive")

        def kill(admin: psycopg.Connection, process: Any) -> None:
            server.kill()

        code, errors = interrupt(server.dsn, file, kill)
        assert code == 1
        assert b"repeat the command with --resume" in errors
        server.start()
        with psycopg.connect(server.dsn, autocommit=True) as admin:
            admin.execute("DROP FUNCTION block CASCADE")
        result = json.loads(run("import", file, "--resume", "--json", dsn=server.dsn).stdout)
        assert result["skipped"] > 100
        assert export(server.dsn) == file.read_bytes()


def test_memory_does_not_grow_with_the_stream(database, target, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large.gz"
    run("export", "--all", small, dsn=database)
    create_long_stream(database, 100_000)
    run("export", "--all", large, dsn=database)
    before = peak_memory("import", small, dsn=target)
    assert peak_memory("import", large, dsn=target) < 1.25 * before
    assert count(target) == 100_001
