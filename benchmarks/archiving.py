"""The archive of finished streams: its size, the replay from it, the cost of moving chunks, and of the migration."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from .loops import repeat
from .measure import TOKEN, Figures, Row, at_least, at_most, compare
from .tables import WITHOUT_0005, Tables

if TYPE_CHECKING:
    from aibind_postgres import PostgresStreamStore

    from .bench import Bench

DOCS = Path(__file__).parents[1] / "docs"
COPIES = 4  # of the stream that is archived, so that the fixed size of a table does not count; one is not archived
ANSWER = 500  # tokens of a stream
EXPIRED, EXPIRED_CHUNKS = 500, 20  # streams of one clean-up, and their chunks
MOST = 1.03  # the ratio of times: 0.97 of the rate

FILL = """
INSERT INTO {chunks} (id, seq, data, created_at)
SELECT $1, seq, data, timestamptz '2026-01-01' + sum(pause) OVER (ORDER BY seq) * interval '1 microsecond'
  FROM (SELECT seq, data, (20000 + random() * 25000)::integer AS pause
          FROM json_array_elements_text($2::text::json) WITH ORDINALITY AS token (data, seq)) AS token
"""
SIZE = "SELECT pg_total_relation_size('{}'::regclass)"


def archiving(bench: Bench) -> list[Row]:
    return [*sizes_and_replay(bench), *moving(bench), *costs_of_the_migration(bench)]


def tokens() -> Iterator[str]:
    """Yield tokens of English prose, of 4.3 bytes on average."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(DOCS.glob("*.md")))
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in without_code.splitlines() if not line.startswith(("|", "    ")))
    words = re.sub(r"\]\([^)]*\)|[`\[*]", "", prose)
    return cycle(re.findall(r" ?[^\W_]{1,9}| ?[^\w\s]+|\s+|_", words))


def store_answer(store: PostgresStreamStore, connection: psycopg.Connection[Any], tables: Tables, data: str) -> str:
    """Store a finished stream with the texts in a JSON array, as if written at 20 to 45 ms each. Return its id."""
    id = store.create()
    count = connection.execute(FILL.format(chunks=tables.chunks), [id, data]).rowcount
    connection.execute(f"UPDATE {tables.status} SET total_chunks = {count} WHERE id = $1", [id])
    store.complete(id)
    return id


def sizes_and_replay(bench: Bench) -> list[Row]:
    tables, chunks = bench.tables("archive"), bench.size.page
    texts = list(islice(tokens(), chunks))
    with tables.store() as store, tables.connect() as connection:
        bench.step(f"storing {chunks:,} chunks {COPIES} times")
        plain, archived, *_ = [store_answer(store, connection, tables, json.dumps(texts)) for _ in range(COPIES)]
        store.unarchive(plain)  # which keeps it out of the archive
        [(before,)] = connection.execute(SIZE.format(tables.chunks))
        store.archive(0)
        connection.execute(f"VACUUM (ANALYZE) {tables.chunks}, {tables.archive}")
        [(size,)] = connection.execute(SIZE.format(tables.archive))
        connection.execute(f"CREATE TABLE {tables.schema}.untimed (LIKE {tables.archive} INCLUDING ALL)")
        connection.execute(
            f"INSERT INTO {tables.schema}.untimed SELECT id, first_seq, last_seq, texts FROM {tables.archive}"
        )
        [(untimed,)] = connection.execute(SIZE.format(f"{tables.schema}.untimed"))

        def read(iterate: Callable[[], Iterator[Any]]) -> Figures:
            return repeat(lambda: deque(iterate(), maxlen=0), bench.size.seconds, units=chunks, warm_up=1)

        found = bench.run_interleaved(
            {
                "archived": lambda: read(lambda: store.read_from(archived, follow=False)),
                "plain": lambda: read(lambda: store.read_from(plain, follow=False)),
                "archived, timed": lambda: read(lambda: store.read_with_times(archived)),
                "plain, timed": lambda: read(lambda: store.read_with_times(plain)),
            }
        )
    per_chunk = {"archived": size / chunks / (COPIES - 1), "untimed": untimed / chunks / (COPIES - 1)}
    average = sum(len(text.encode()) for text in texts) / chunks
    work = f"archive, a token of {average:.1f} bytes"
    replay, peer = f"replay of {chunks:,} archived chunks", "not archived"
    return [
        Row(f"{work}, with its time", "bytes", [per_chunk["archived"]], target=at_most(10)),
        Row(f"{work}, with its time", "bytes", [per_chunk["archived"]], peer, [before / chunks / COPIES]),
        Row(f"{work}, without times", "bytes", [per_chunk["untimed"]], target=at_most(4)),
        compare(replay, "rate", found["archived"], peer, found["plain"], at_least(2)),
        compare(f"{replay}, with times", "rate", found["archived, timed"], peer, found["plain, timed"]),
    ]


def moving(bench: Bench) -> list[Row]:
    """Archive answers of 500 tokens, and bring them back."""
    tables, chunks = bench.tables("archive_moving"), bench.size.page
    source = tokens()
    archive_times, restore_times, sizes = [], [], []
    with tables.store() as store, tables.connect() as connection:
        bench.step(f"storing {chunks:,} chunks")
        answers = [
            store_answer(store, connection, tables, json.dumps(list(islice(source, ANSWER))))
            for _ in range(chunks // ANSWER)
        ]
        with without_full_page_images(connection):
            before = wal_position(connection)
            moved = store.archive(0).chunks
            sizes.append((wal_position(connection) - before) / moved)
        for number in range(bench.size.rounds):
            bench.step(f"round {number + 1} of {bench.size.rounds}: archive and unarchive")
            start = time.perf_counter()
            for id in answers:
                store.unarchive(id)
            restore_times.append((time.perf_counter() - start) / chunks * 1e6)
            connection.execute(f"UPDATE {tables.status} SET archived_at = NULL")
            connection.execute(f"VACUUM (ANALYZE) {tables.chunks}, {tables.archive}, {tables.status}")
            start = time.perf_counter()
            moved = store.archive(0).chunks
            archive_times.append((time.perf_counter() - start) / moved * 1e6)
    work = f"archive {chunks // ANSWER:,} streams of {ANSWER} chunks, for each chunk"
    return [
        Row(work, "µs", archive_times, target=at_most(20)),
        Row(f"{work}, WAL without full-page images", "bytes", sizes, target=at_most(100)),
        Row(f"unarchive streams of {ANSWER} chunks, for each chunk", "µs", restore_times),
    ]


@contextmanager
def without_full_page_images(connection: psycopg.Connection[Any]) -> Iterator[None]:
    connection.execute("ALTER SYSTEM SET full_page_writes = off")
    connection.execute("SELECT pg_reload_conf()")
    while connection.execute("SHOW full_page_writes").fetchone() != ("off",):
        time.sleep(0.01)
    try:
        connection.execute("CHECKPOINT")  # the checkpointer applies the setting
        yield
    finally:
        connection.execute("ALTER SYSTEM RESET full_page_writes")
        connection.execute("SELECT pg_reload_conf()")


def wal_position(connection: psycopg.Connection[Any]) -> int:
    [(position,)] = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
    return int(position)


def costs_of_the_migration(bench: Bench) -> list[Row]:
    """Append, create and clean up with and without the foreign key to the status table, its column and its index."""
    with_0005, without_0005 = bench.tables("with_0005"), bench.tables("without_0005", WITHOUT_0005)
    with with_0005.store() as store, without_0005.store() as older:
        found = bench.alternate(
            {
                "append": partial(store.append, store.create(), TOKEN),
                "append without 0005": partial(older.append, older.create(), TOKEN),
                "create": store.create,
                "create without 0005": older.create,
            }
        )

        def clean_up(tables: Tables, store: PostgresStreamStore) -> Figures:
            with tables.connect() as connection:
                connection.execute(
                    f"INSERT INTO {tables.status} (id, state, total_chunks, expires_at) "
                    f"SELECT 'expired ' || n, 'done', {EXPIRED_CHUNKS}, 1 FROM generate_series(1, {EXPIRED}) AS n"
                )
                connection.execute(
                    f"INSERT INTO {tables.chunks} (id, seq, data) SELECT 'expired ' || n, seq, $1 "
                    f"FROM generate_series(1, {EXPIRED}) AS n, generate_series(1, {EXPIRED_CHUNKS}) AS seq",
                    [TOKEN],
                )
            start = time.perf_counter()
            assert store.cleanup().streams == EXPIRED
            return {"rate": EXPIRED / (time.perf_counter() - start)}

        cleaned = bench.run_interleaved(
            {
                "with 0005": partial(clean_up, with_0005, store),
                "without 0005": partial(clean_up, without_0005, older),
            }
        )
    peer = "without migration 0005"
    append, older_append = found["append"], found["append without 0005"]
    create, older_create = found["create"], found["create without 0005"]
    work = f"cleanup, streams of {EXPIRED_CHUNKS} chunks, with migration 0005"
    return [
        compare("append, with migration 0005, p50", "p50", append, peer, older_append, at_most(MOST)),
        compare("create, with migration 0005, p50", "p50", create, peer, older_create, at_most(MOST)),
        compare(work, "rate", cleaned["with 0005"], peer, cleaned["without 0005"]),
    ]
