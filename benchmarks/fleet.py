"""A fleet: many processes on one database, each with one store, live streams, and readers of any stream.

`python -m benchmarks.fleet` runs fleets of growing size. The processes import this module as well, so it imports
little.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import make_conninfo

from aibind_postgres import embedded

from .fleet_figures import CONNECTIONS, KEPT_UP, PROCESSES, SPARE, Run, Size, fleet_of, growing, largest
from .fleet_run import run_fleet
from .measure import Row, at_least
from .server_load import available_memory
from .tables import Tables

if TYPE_CHECKING:
    from .bench import Bench

SETTLE = 3.0  # seconds until the pools and the pauses of the processes have adapted
SHORT = 20.0  # seconds of each run but the last one
DATABASE = "aibind_fleet"  # created and dropped for each run


def fleet(bench: Bench) -> list[Row]:
    """Run one fleet on the server of the other benchmarks, which has few connections."""
    most, chats = largest_for(bench.dsn), bench.size.chats
    processes = min(most.processes, max(2, chats // 25))
    size = fleet_of(processes, min(most.tokens, 10 * chats))
    run = run_fleet(bench.database("fleet"), size, bench.size.live_seconds, min(SETTLE, bench.size.settle), bench.step)
    work = f"fleet of {processes} processes, {size.readers:,} readers of {size.streams:,} answers"
    rows = [
        Row(f"{work}: share of the wanted tokens, {size.tokens:,.0f}/s", "", [run.reached], target=at_least(KEPT_UP)),
        Row(f"{work}: write to reader, p50", "ms", [run.p50]),
        Row(f"{work}: write to reader, p99", "ms", [run.p99]),
        Row(f"{work}: notifications received by each process", "/s", [run.each(run.received)]),
        Row(f"{work}: processor time for a notification of another process", "µs", [run.idle_cost * 1e6]),
        Row(f"{work}: processor time of the processes for a token", "µs", [run.per_token(run.processor) * 1e6]),
    ]
    if run.server_processor is not None:
        cost = run.per_token(run.server_processor) * 1e6
        rows.append(Row(f"{work}: processor time of the server for a token", "µs", [cost]))
    return rows


def largest_for(dsn: str) -> Size:
    """Return the largest fleet for this machine and a server."""
    with psycopg.connect(dsn) as connection:
        [[most]] = connection.execute("SELECT current_setting('max_connections')::integer").fetchall()
    return largest(os.cpu_count() or 1, available_memory(), most)


def main(
    json: Path | None = None,
    dsn: str | None = None,
    seconds: float = 60.0,
    processes: int | None = None,
    tokens: float | None = None,
) -> None:
    """Run fleets of growing size, up to the largest one for this machine and server, and write their figures to --json.

    Without --dsn, a new embedded server is used. --seconds is the duration of the largest run. With --processes and
    --tokens (of all streams, in one second), one fleet of this size is run instead.
    """
    runs: list[Run] = []
    with server(dsn) as found:
        most = largest_for(found)
        print(f"{os.cpu_count()} cores, {available_memory():,.0f} MiB available: {most}", flush=True)
        sizes = growing(most)
        if processes is not None or tokens is not None:
            sizes = [("largest", fleet_of(processes or most.processes, tokens or most.tokens))]
        for series, size in sizes:
            duration = seconds if series == "largest" else min(SHORT, seconds)
            with database(found) as tables:
                run = run_fleet(tables, size, duration, SETTLE, show, series)
            runs.append(run)
            show("")
            print(run, flush=True)
            if json is not None:
                json.write_text(as_json(runs, found), "utf-8")


def show(text: str) -> None:
    """Show the progress in one line of a terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def as_json(runs: list[Run], dsn: str) -> str:
    from .report import environment  # not in the processes of the fleet

    with psycopg.connect(dsn) as connection:
        postgres = connection.info.parameter_status("server_version") or ""
    about: dict[str, Any] = environment(postgres, "not used")
    return dumps({**about, "runs": [asdict(run) for run in runs]}, indent=1) + "\n"


@contextmanager
def server(dsn: str | None) -> Iterator[str]:
    """Yield the connection string of a server: the given one, or a new one with connections for the largest fleet."""
    if dsn is not None:
        yield dsn
        return
    with tempfile.TemporaryDirectory() as folder:
        with embedded.server(folder) as found, psycopg.connect(found, autocommit=True) as admin:
            admin.execute(f"ALTER SYSTEM SET max_connections = {(PROCESSES + 1) * CONNECTIONS + SPARE}")
        with embedded.server(folder) as found:  # which has ended in the meantime
            yield found


@contextmanager
def database(dsn: str) -> Iterator[Tables]:
    """Yield tables in a new database."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        admin.execute(f"CREATE DATABASE {DATABASE}")
        tables = Tables(make_conninfo(dsn, dbname=DATABASE), "fleet")
        tables.migrate()
        try:
            yield tables
        finally:
            admin.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


if __name__ == "__main__":
    import typer

    typer.run(main)
