"""Reading with a hot standby as the replica of a store, and on the standby alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from aibind_postgres import PostgresStreamStore, embedded

from .bench import Bench
from .loops import durations
from .measure import TOKEN, Figures, Missing, Row, compare
from .processes import process
from .reading import STORED_CHUNKS, STORED_STREAMS
from .tables import Tables
from .tail import END, SLOW, WAKE_UP, in_rounds, send_at, tail_store

APPLICATION = "reader"  # its sessions are measured
REPLICATION_TIMEOUT = 60  # seconds


def replicas(bench: Bench) -> list[Row]:
    if isinstance(bench.pgbench, Missing):
        return [Row("reading with a replica", note=bench.pgbench.reason)]
    with standby_of(bench.dsn, bench.pgbench.parent) as standby:
        return [*with_replica(bench, standby), *on_standby(bench, standby)]


def with_replica(bench: Bench, standby: str) -> list[Row]:
    """Read finished streams: a long one, and many short ones as after the reload of a page."""
    tables, chunks = bench.tables("replicas"), bench.size.page
    dsn = make_conninfo(bench.dsn, application_name=APPLICATION)
    with tables.store() as store, tables.connect() as admin:
        long = store.create()
        for _ in range(chunks // 1_000):
            store.append_many(long, [TOKEN] * 1_000)
        store.complete(long)
        short = [store.create() for _ in range(STORED_STREAMS)]
        for stream in short:
            store.append_many(stream, [TOKEN] * STORED_CHUNKS)
            store.complete(stream)
        admin.execute(f"VACUUM (ANALYZE) {tables.chunks}, {tables.status}")
        wait_for(standby, admin)
        in_turn = cycle(short)

        def figures(replica: str | None, next_stream: Callable[[], str], units: int, warm_up: int) -> Figures:
            with PostgresStreamStore(dsn, **tables.names, replica=replica) as reading:

                def read() -> None:
                    deque(reading.read_from(next_stream()), maxlen=0)

                for _ in range(warm_up):
                    read()
                before = processor_time(admin)
                read_in = durations(read, bench.size.seconds)
                processor = processor_time(admin) - before
                return {"rate": len(read_in) * units / sum(read_in), "processor": processor / len(read_in) * 1e6}

        def variants(next_stream: Callable[[], str], units: int, warm_up: int) -> dict[str, Any]:
            run = partial(figures, next_stream=next_stream, units=units, warm_up=warm_up)
            return {"replica": partial(run, standby), "alone": partial(run, None)}

        long_found = bench.run_interleaved(variants(lambda: long, chunks, 1))
        short_found = bench.run_interleaved(variants(lambda: next(in_turn), 1, 100))
    alone = "the primary alone"
    rows = []
    for work, found in (
        (f"replay of {chunks:,} chunks with a replica", long_found),
        (f"stored stream of {STORED_CHUNKS} with a replica", short_found),
    ):
        ours, theirs = found["replica"], found["alone"]
        rows.append(compare(work, "rate", ours, alone, theirs))
        rows.append(compare(f"{work}: processor time of the primary", "processor", ours, alone, theirs))
    return rows


def on_standby(bench: Bench, standby: str) -> list[Row]:
    """Follow a stream with a store that has a standby alone."""
    tables, count = bench.tables("standby"), round(SLOW * 3.5 * bench.size.seconds)
    with tables.store() as store, tables.connect() as admin:
        stream = store.create()
        store.append(stream, "first chunk: its reader reports that it is ready")
        wait_for(standby, admin)
        with process(tail_store, Tables(standby, tables.schema), stream) as pipe:
            pipe.recv()
            for number in range(bench.size.rounds):
                bench.step(f"standby, round {number + 1} of {bench.size.rounds}")
                store.append(stream, WAKE_UP)
                time.sleep(min(1.2, bench.size.settle))
                send_at(SLOW, count, lambda text: store.append(stream, text))
            store.append(stream, END)
            found = in_rounds(pipe.recv(), count)
    work = f"chunk to a reader on a hot standby, {SLOW}/s"
    return [Row(f"{work}, {name}", "ms", found.figures[name]) for name in ("p50", "p99")]


@contextmanager
def standby_of(dsn: str, programs: Path) -> Iterator[str]:
    """Start a hot standby of an embedded server and yield its connection string."""
    with psycopg.connect(dsn) as admin:
        [(primary,)] = admin.execute("SHOW data_directory").fetchall()
    owner = Path(primary).stat()
    folder = Path(tempfile.mkdtemp(prefix="aibind-postgres-"))
    try:
        options: dict[str, Any] = {}
        if os.geteuid() == 0:  # the server runs as another user
            os.chown(folder, owner.st_uid, owner.st_gid)
            options = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        backup = [str(programs / "pg_basebackup"), "--write-recovery-conf", "--checkpoint=fast", f"--dbname={dsn}"]
        subprocess.run([*backup, "-D", str(folder / "data")], check=True, capture_output=True, cwd="/", **options)
        for copied in (folder / "data").glob(".s.PGSQL.*"):  # the lock of the primary's socket
            copied.unlink()
        with embedded.server(folder / "data") as standby:
            yield standby
    finally:
        shutil.rmtree(folder)


def wait_for(standby: str, admin: psycopg.Connection[Any]) -> None:
    """Wait until a standby has replayed all changes so far."""
    [(position,)] = admin.execute("SELECT pg_current_wal_lsn()::text").fetchall()
    deadline = time.monotonic() + REPLICATION_TIMEOUT
    with psycopg.connect(standby, autocommit=True) as replaying:
        while replaying.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [position]).fetchone() != (True,):
            if time.monotonic() > deadline:
                raise TimeoutError("the standby does not replay the changes of its primary")
            time.sleep(0.01)


def processor_time(admin: psycopg.Connection[Any]) -> float:
    """Return the processor time of the measured sessions of the primary so far, in seconds. Linux only."""
    rows = admin.execute("SELECT pid FROM pg_stat_activity WHERE application_name = $1", [APPLICATION]).fetchall()
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for (pid,) in rows) / 1e9
