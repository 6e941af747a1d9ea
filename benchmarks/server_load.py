"""The load of a PostgreSQL server: its processor time, write-ahead log, disk and connections."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import psycopg

    from .tables import Tables

PROC = Path("/proc")

COUNTERS = """
SELECT (SELECT sum(total_chunks) FROM {status}),
       pg_current_wal_insert_lsn() - '0/0'::pg_lsn,
       (SELECT wal_fpi FROM pg_stat_wal),
       pg_total_relation_size($1::text::regclass) + pg_total_relation_size($2::text::regclass)
"""

# The last statement of a LISTEN connection is LISTEN: notifications need none.
CONNECTIONS = """
SELECT count(*) FILTER (WHERE query NOT LIKE 'LISTEN %'), count(*) FILTER (WHERE query LIKE 'LISTEN %')
  FROM pg_stat_activity WHERE application_name = $1
"""


class Load(NamedTuple):
    """Counters of a server, which grow, or their growth. Processor times are seconds."""

    seconds: float
    processor: float | None  # of the server; None if it runs on another machine
    busy: float | None  # of all programs on this machine; None if unknown
    tokens: int
    wal: int  # bytes of the write-ahead log
    page_images: int  # full-page images in it
    disk: int  # bytes of both tables and their indexes

    def since(self, before: Load) -> Load:
        """Return the growth since an earlier time."""
        return Load._make(
            None if now is None or then is None else now - then for now, then in zip(self, before, strict=True)
        )


def load(admin: psycopg.Connection[Any], tables: Tables) -> Load:
    """Return the counters of a server."""
    statement = COUNTERS.format(status=tables.status)
    [counters] = admin.execute(statement.encode(), [tables.chunks, tables.status]).fetchall()
    tokens, wal, page_images, disk = map(int, counters)
    processor = server_processor(admin.info.backend_pid)
    return Load(time.monotonic(), processor, busy(), tokens, wal, page_images, disk)


def connections(admin: psycopg.Connection[Any], application: str) -> tuple[int, int]:
    """Return the number of pooled and of LISTEN connections of an application."""
    [(pooled, listening)] = admin.execute(CONNECTIONS, [application]).fetchall()
    return pooled, listening


def server_processor(backend_pid: int) -> float | None:
    """Return the processor time of a server and its processes, also of those that have ended.

    Args:
        backend_pid: The process id of one session of the server.
    """
    try:
        if (PROC / str(backend_pid) / "comm").read_text() not in ("postgres\n", "postmaster\n"):
            return None
        postmaster = int(stat(backend_pid)[1])
        children = (PROC / str(postmaster) / "task" / str(postmaster) / "children").read_text().split()
        ticks = sum(map(int, stat(postmaster)[11:15]))  # with the children that have ended
    except OSError:
        return None
    for child in map(int, children):
        try:
            ticks += sum(map(int, stat(child)[11:13]))
        except OSError:
            continue  # it has ended
    return float(ticks / os.sysconf("SC_CLK_TCK"))


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name: state, parent, … the name may contain spaces."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def busy() -> float | None:
    """Return the processor time of all programs on this machine."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, (PROC / "stat").read_text().splitlines()[0].split()[1:])
    except OSError:
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def available_memory() -> float:
    """Return the available memory of this machine, in MiB."""
    meminfo = PROC / "meminfo"
    if meminfo.exists():
        [available] = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
        return int(available.split()[1]) / 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
