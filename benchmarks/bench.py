"""Context of a benchmark: the servers, the number and length of rounds, and the progress display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from .measure import Figures, Missing, Results, run_interleaved
from .peers import Redis
from .tables import Tables

Peer = TypeVar("Peer")


@dataclass(frozen=True)
class Bench:
    dsn: str
    pgbench: Path | Missing
    redis: dict[str, Redis | Missing]  # by the policy of appendfsync
    quick: bool
    step: Callable[[str], None]

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    @property
    def seconds(self) -> float:
        """Duration of one variant in one round."""
        return 0.5 if self.quick else 1.25

    def tables(self, name: str) -> Tables:
        tables = Tables(self.dsn, name)
        tables.migrate()
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
        return run_interleaved(rounds or self.rounds, variants, self.step)


def with_peer(peer: Peer | Missing, run: Callable[[Peer], Figures]) -> Callable[[], Figures] | Missing:
    """Return a variant that runs with this peer, or the reason why the peer is missing."""
    return peer if isinstance(peer, Missing) else partial(run, peer)
