"""Databases on a Citus cluster, for test runs in which `AIBIND_TEST_DSN` leads to its coordinator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import NamedTuple

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from aibind_postgres import schema


class Cluster(NamedTuple):
    """The servers of a cluster, as connection strings, and the host and port of each worker for the coordinator."""

    coordinator: str
    workers: list[tuple[str, int]]

    @property
    def servers(self) -> list[str]:
        workers = [make_conninfo(self.coordinator, host=host, port=port) for host, port in self.workers]
        return [*workers, self.coordinator]


@cache
def cluster_of(server: str) -> Cluster | None:
    """Return the cluster of a coordinator, or None for a server without Citus."""
    with psycopg.connect(server, autocommit=True) as connection:
        [(has_citus,)] = connection.execute("SELECT to_regclass('pg_catalog.pg_dist_node') IS NOT NULL")
        if not has_citus:
            return None
        nodes = connection.execute(
            "SELECT nodename, nodeport FROM pg_dist_node "
            "WHERE shouldhaveshards AND noderole = 'primary' ORDER BY nodeport"
        ).fetchall()
    return Cluster(server, nodes)


def skip_on_citus(server: str, reason: str) -> None:
    """Skip a test of a feature that a distributed table cannot have."""
    if cluster_of(server) is not None:
        pytest.skip(f"on Citus: {reason}")


@contextmanager
def own_database(cluster: Cluster, name: str, *, migrated: bool) -> Iterator[str]:
    """Create a database on each server of a cluster, and drop it at the end.

    A template cannot contain Citus, whose tables name the servers, so that the schema is created in each database.
    """
    with ExitStack() as stack:
        for server in cluster.servers:
            stack.enter_context(_database_on(server, name))
        dsn = make_conninfo(cluster.coordinator, dbname=name)
        with psycopg.connect(dsn, autocommit=True) as coordinator:
            info = coordinator.info
            coordinator.execute("SELECT citus_set_coordinator_host(%s, %s)", [info.host, info.port])
            for host, port in cluster.workers:
                coordinator.execute("SELECT citus_add_node(%s, %s)", [host, port])
        if migrated:
            schema.migrate(dsn, citus=True)
        yield dsn


@contextmanager
def _database_on(server: str, name: str) -> Iterator[None]:
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    try:
        with psycopg.connect(server, dbname=name, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION citus")
        yield
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
