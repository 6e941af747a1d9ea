"""How soon a chunk reaches a reader in another process: with announcements, and found by polling alone.

Run `python benchmarks/tail_latency.py [DSN]`; without a connection string it uses an embedded server. The two ways are
measured in turn, chunk by chunk, so that a machine's changing load meets both. The clock is one clock, read by the
writer before it sends a chunk and by the reader when it has it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import psycopg

from aibind_postgres import PostgresStreamStore, embedded, schema

CHUNKS = 500
PAUSE = 0.02  # seconds between two chunks: 50 tokens a second
TABLES = {"chunks_table": "tail_latency.chunks", "status_table": "tail_latency.status"}

READER = """
import sys, time
from aibind_postgres import PostgresStreamStore
dsn, stream, chunks, status = sys.argv[1:]
with PostgresStreamStore(dsn, chunks_table=chunks, status_table=status) as store:
    for chunk in store.read_from(stream):
        print(time.monotonic() - float(chunk.data), flush=True)
"""

# What a writer sends that announces nothing, such as the TypeScript package.
UNANNOUNCED = """
WITH next AS (UPDATE tail_latency.status SET total_chunks = total_chunks + 1 WHERE id = %s RETURNING id, total_chunks)
INSERT INTO tail_latency.chunks (id, seq, data) SELECT id, total_chunks, %s FROM next
"""


def measure(dsn: str) -> dict[str, list[float]]:
    """Return the latencies in seconds of either way."""
    with PostgresStreamStore(dsn, **TABLES) as store, psycopg.connect(dsn, autocommit=True) as plain:
        streams = {"announced": store.create(), "polled": store.create()}
        command = [sys.executable, "-c", READER, dsn]
        readers = {
            way: subprocess.Popen([*command, stream, *TABLES.values()], stdout=subprocess.PIPE, text=True)
            for way, stream in streams.items()
        }
        time.sleep(1.5)  # until both listen
        for _ in range(CHUNKS):
            store.append(streams["announced"], str(time.monotonic()))
            time.sleep(PAUSE / 2)
            plain.execute(UNANNOUNCED, [streams["polled"], str(time.monotonic())])
            time.sleep(PAUSE / 2)
        for stream in streams.values():
            store.complete(stream)
        return {way: [float(line) for line in reader.communicate()[0].split()] for way, reader in readers.items()}


def main() -> None:
    with ExitStack() as stack:
        dsn = sys.argv[1] if len(sys.argv) > 1 else stack.enter_context(embedded.server())
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute("DROP SCHEMA IF EXISTS tail_latency CASCADE; CREATE SCHEMA tail_latency")
            schema.migrate(dsn, **TABLES, conversations_table="tail_latency.conversations")
            latencies = measure(dsn)
            admin.execute("DROP SCHEMA tail_latency CASCADE")
    medians = {}
    for way, values in latencies.items():
        medians[way] = statistics.median(values)
        slowest = statistics.quantiles(values, n=100)[98]
        print(f"{way:10} {len(values)} chunks: median {medians[way] * 1e3:6.2f} ms, 99th {slowest * 1e3:6.2f} ms")
    print(f"announced / polled, medians: 1/{medians['polled'] / medians['announced']:.0f}")


if __name__ == "__main__":
    main()
