"""Context of a benchmark: the servers, the number and length of rounds, and the progress display."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from .loops import TOTAL_WARM_UP, alternate
from .measure import Figures, Missing, Results, run_interleaved
from .peers import Redis
from .tables import Tables

Peer = TypeVar("Peer")


class Size(NamedTuple):
    """The amount of work of a run. All times are seconds."""

    rounds: int
    long_rounds: int  # rounds of the variants that take much longer
    seconds: float  # duration of one variant in one round
    live_seconds: int  # duration of one round of live chats
    chats: int
    readers: int
    settle: float  # until a server process has published its statistics
    page: int  # chunks of a replayed stream
    memory: int  # chunks of the stream that is read to measure memory
    stored: int  # chunks of a large table
    lengths: tuple[int, ...]  # of conversations, in messages


# A server process publishes its statistics once per second while it works, and after 10 s if idle.
FULL = Size(5, 3, 2.0, 8, 200, 1_000, 11.0, 100_000, 1_000_000, 10_000_000, (10, 1_000, 10_000))
QUICK = FULL._replace(rounds=3, long_rounds=1, seconds=0.5, live_seconds=3, stored=1_000_000, lengths=(10, 1_000))
# Only shows that the benchmarks work.
SMOKE = Size(1, 1, 0.05, 1, 10, 20, 0.5, 2_000, 100_000, 10_000, (10,))


@dataclass(frozen=True)
class Bench:
    dsn: str
    pgbench: Path | Missing
    redis: dict[str, Redis | Missing]  # by the policy of appendfsync
    size: Size
    step: Callable[[str], None]

    def tables(self, name: str, until: str | None = None) -> Tables:
        tables = Tables(self.dsn, name)
        tables.migrate(until)
        return tables

    def database(self, name: str) -> Tables:
        """Return tables in a new database, isolated from the notifications and statistics of other benchmarks."""
        with psycopg.connect(self.dsn, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name}")
        tables = Tables(make_conninfo(self.dsn, dbname=name), name)
        tables.migrate()
        return tables

    def run_interleaved(
        self, variants: dict[str, Callable[[], Figures] | Missing], rounds: int | None = None
    ) -> dict[str, Results]:
        return run_interleaved(rounds or self.size.rounds, variants, self.step)

    def alternate(self, operations: Mapping[str, Callable[[], object]]) -> dict[str, Results]:
        """Run operations in turn. A disturbance affects all of them, so small differences are seen."""
        alternate(operations, TOTAL_WARM_UP)
        results = {name: Results() for name in operations}
        for number in range(self.size.rounds):
            self.step(f"round {number + 1} of {self.size.rounds}")
            for name, figures in alternate(operations, round(self.size.seconds * 500)).items():
                results[name].add(figures)
        return results


def with_peer(peer: Peer | Missing, run: Callable[[Peer], Figures]) -> Callable[[], Figures] | Missing:
    """Return a variant that runs with this peer, or the reason why the peer is missing."""
    return peer if isinstance(peer, Missing) else partial(run, peer)
