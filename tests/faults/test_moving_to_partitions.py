"""The documented move of existing tables to partitions, and back, while streams are written, read and deleted."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import servers

from aibind_postgres import PostgresStreamStore, schema

PAGE = Path(__file__).resolve().parents[2] / "docs" / "partitions.md"
SQL = re.compile(r"^```sql\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.timeout(3600)

# Streams that have ended: a fifth of them expires while the tables are moved.
OLD_STREAMS = """
INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at)
SELECT 'old ' || i, 'done', 100,
       CASE WHEN i %% 5 = 0 THEN (extract(epoch FROM now()) + 60 * random()) * 1000 ELSE 9e15 END
  FROM generate_series(1, %s) AS i;
INSERT INTO aibind_stream_chunks (id, seq, data)
SELECT id, seq, id || ' ' || seq FROM aibind_stream_status, generate_series(1, 100) AS seq;
VACUUM ANALYZE
"""
WRONG_STREAMS = """
SELECT id, total_chunks, count(seq), count(seq) FILTER (WHERE data <> id || ' ' || seq)
  FROM aibind_stream_status LEFT JOIN aibind_stream_chunks USING (id)
 WHERE state <> 'deleted' AND id NOT LIKE 'again %'
 GROUP BY id, total_chunks
HAVING count(seq) <> total_chunks OR max(seq) <> total_chunks OR bool_or(data <> id || ' ' || seq)
"""


class Load:
    """Writers, readers, deletions and an archiver, until `stop`. A text names its stream and its number."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self.deleted: list[str] = []
        self.acknowledged: dict[str, list[str]] = {}  # the texts of the streams that exist
        self.read = 0  # chunks
        self.appends: list[tuple[float, float]] = []  # when each began, and its seconds

    def start(self) -> None:
        writers = [*[self._write] * 6, *[self._write_again] * 4, self._write_as_typescript]
        for part in (*writers, *[self._read] * 3, self._clean, self._archive):
            self._threads.append(threading.Thread(target=self._run, args=(part,), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60 if not self._errors else 1)  # the reader of a lost stream waits for ever
        assert self._errors == []
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, part: Callable[[PostgresStreamStore], None]) -> None:
        try:
            with PostgresStreamStore(self._dsn) as store:
                while not self._is_over.is_set():
                    part(store)
        except BaseException as error:
            self._errors.append(error)

    def _write(self, store: PostgresStreamStore) -> None:
        """Write a stream to its end."""
        self._fill(store, store.create(), 80, "")

    def _write_again(self, store: PostgresStreamStore) -> None:
        """Write a stream, delete it, and write a shorter one with its id."""
        id = store.create(f"again {uuid.uuid4()}")
        self._fill(store, id, 9, "old ")
        del self.acknowledged[id]
        assert store.delete(id)
        time.sleep(0.02)
        store.create(id)
        self._fill(store, id, 7, "new ")

    def _fill(self, store: PostgresStreamStore, id: str, count: int, prefix: str) -> None:
        texts = self.acknowledged[id] = []
        while len(texts) < count:
            more = [f"{prefix}{id} {len(texts) + number}" for number in range(1, 1 + len(texts) % 3)]
            begun = time.monotonic()
            if more:
                assert store.append_many(id, more, expected_seq=len(texts) + 1) == len(texts) + len(more)
            else:
                more = [f"{prefix}{id} {len(texts) + 1}"]
                assert store.append(id, more[0], expected_seq=len(texts) + 1) == len(texts) + 1
            self.appends.append((begun, time.monotonic() - begun))
            texts += more
            time.sleep(0.005)
        assert store.complete(id)

    def _write_as_typescript(self, _: PostgresStreamStore) -> None:
        """Write with the statements of the TypeScript package."""
        id = str(uuid.uuid4())
        append = (
            "WITH next AS (UPDATE aibind_stream_status SET total_chunks = total_chunks + 1 WHERE id = %s "
            "RETURNING id, total_chunks) "
            "INSERT INTO aibind_stream_chunks (id, seq, data) SELECT id, total_chunks, %s FROM next"
        )
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("INSERT INTO aibind_stream_status (id, expires_at) VALUES (%s, 9e15)", [id])
            texts = self.acknowledged[id] = []
            for number in range(1, 50):
                connection.execute(append, [id, f"{id} {number}"])
                texts.append(f"{id} {number}")
                time.sleep(0.01)
            connection.execute("UPDATE aibind_stream_status SET state = 'done' WHERE id = %s", [id])

    def _read(self, store: PostgresStreamStore) -> None:
        """Follow the newest stream to its end."""
        ids = [id for id in list(self.acknowledged) if not id.startswith("again")]
        if not ids:
            time.sleep(0.01)
            return
        for number, chunk in enumerate(store.read_from(ids[-1]), 1):
            assert chunk == (number, f"{ids[-1]} {number}"), (chunk, number)
            self.read += 1

    def _clean(self, store: PostgresStreamStore) -> None:
        """Delete expired streams, and another one."""
        store.cleanup()
        id = f"old {5 * len(self.deleted) + 1}"
        if store.delete(id):
            self.deleted.append(id)
        time.sleep(0.05)

    def _archive(self, store: PostgresStreamStore) -> None:
        """Archive the streams that have ended, and bring one back."""
        store.archive(0.5, batch_size=500)
        if ids := [id for id in list(self.acknowledged) if not id.startswith("again")]:
            store.unarchive(random.choice(ids))
        time.sleep(0.02)


ORPHANS = """
SELECT count(*) FROM aibind_stream_chunks AS c
 WHERE NOT EXISTS (SELECT FROM aibind_stream_status AS s WHERE s.id = c.id)
"""
PARTITIONED = "SELECT partrelid::regclass::text FROM pg_partitioned_table"


def test_move_under_load(tmp_path: Path, long: bool) -> None:
    page = PAGE.read_text("utf-8")
    [procedures] = SQL.findall(page)
    create, prepare, copy, switch, drop, abort, create_plain = COMMANDS.findall(page)
    (tmp_path / "move.sql").write_text(procedures, "utf-8")
    with servers.own_server() as server:
        if not server.has("psql"):
            pytest.skip("needs psql of PostgreSQL")
        path = os.pathsep.join([str(Path(sys.executable).parent), str(server.programs), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "DATABASE_URL": server.dsn}
        schema.migrate(server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as admin:
            for statement in (OLD_STREAMS % (10_000 if long else 200)).split(";"):
                admin.execute(statement)
            load = Load(server.dsn)

            def run(command: str) -> None:
                """Run a command of the page, and report its time and that of the longest append."""
                begun = time.monotonic()
                options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
                done = subprocess.run(["bash", "-ec", command], check=False, **options)
                assert done.returncode == 0, done.stderr
                longest = max([took for start, took in list(load.appends) if start + took > begun], default=0)
                print(f"{time.monotonic() - begun:.2f} s, longest append {longest:.3f} s: {command.strip()}")
                print(*[line for line in done.stderr.splitlines() if "exchanged" in line])

            load.start()
            try:
                time.sleep(1)
                for command in (create, prepare, copy, abort, create, prepare, copy, switch, drop):
                    run(command)
                partitioned = {name for (name,) in admin.execute(PARTITIONED)}
                assert partitioned == {"aibind_stream_chunks", "aibind_stream_status"}
                time.sleep(1)
                for command in (create_plain, prepare, copy, switch, drop):
                    run(command)
                assert admin.execute(PARTITIONED).fetchall() == []
                for command in (create.replace("--partitions 16", "--partitions time"), prepare, copy, switch, drop):
                    run(command)
                assert ("aibind_stream_chunks_default",) in admin.execute(PARTITIONED).fetchall()
            finally:
                load.stop()
            assert load.read > 100
            with PostgresStreamStore(server.dsn) as store:
                for (id,) in admin.execute("SELECT DISTINCT id FROM aibind_stream_chunks_archive").fetchall():
                    store.unarchive(id)
            for id, texts in load.acknowledged.items():
                found = admin.execute("SELECT seq, data FROM aibind_stream_chunks WHERE id = %s ORDER BY seq", [id])
                assert found.fetchall() == [*enumerate(texts, 1)], id
            assert admin.execute(WRONG_STREAMS).fetchall() == []
            remaining = admin.execute("SELECT id FROM aibind_stream_status WHERE id = ANY(%s)", [load.deleted])
            assert remaining.fetchall() == []
            assert admin.execute(ORPHANS).fetchone() == (0,)


def test_procedures_refuse_other_isolation_levels(database: str) -> None:
    """Changes that are made while the lock is awaited would be lost."""
    [procedures] = SQL.findall(PAGE.read_text("utf-8"))
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(procedures.encode())
    options = "-c default_transaction_isolation=repeatable\\ read"
    with psycopg.connect(database, autocommit=True, options=options) as connection:
        for name in ("copy", "switch"):
            with pytest.raises(psycopg.errors.RaiseException, match="default_transaction_isolation"):
                connection.execute(f"CALL aibind_move.{name}()")
