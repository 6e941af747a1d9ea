"""Databases on a Citus cluster, for test runs in which `AIBIND_TEST_DSN` leads to its coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import NamedTuple

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from aibind_postgres import schema

# The tests that are skipped, by the reason.
IMPOSSIBLE = {
    "it has no triggers on distributed tables": [
        "test_clients::test_row_that_cannot_be_updated",
        "test_combined_appends::test_rejected_batch_raises_only_in_the_append_at_fault",
        "test_deletion::test_cleanup_deletes_at_most_10_000_chunks_at_once",
        "test_deletion::test_cleanup_of_conversations_is_bounded_in_bytes",
        "test_deletion::test_delete_deletes_at_most_10_000_chunks_at_once",
        "test_deletion::test_recreated_stream_deletes_at_most_10_000_leftover_chunks_at_once",
        "test_housekeeping::test_refused_marker",
        "test_housekeeping::test_turns_are_a_period_apart",
        "test_leases::test_reader_tries_again_after_a_refusal",
        "test_leases::test_refusal_for_the_moment_is_no_outage",
        "test_live_reading::test_notifications_contain_no_stream_id",
        "test_live_reading::test_trigger_notifies_for_foreign_writers",
        "test_producing::test_error_on_closing_the_source_is_not_exposed",
        "test_synchronous_commit::test_default_of_the_server",
        "test_synchronous_commit::test_every_write_uses_the_option",
    ],
}


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


def skip_impossible(items: Iterable[pytest.Item]) -> None:
    """Skip the tests that a cluster cannot pass."""
    reasons = {name: reason for reason, names in IMPOSSIBLE.items() for name in names}
    for item in items:
        if reason := reasons.get(f"{item.path.stem}::{item.name.split('[')[0]}"):
            item.add_marker(pytest.mark.skip(reason=f"on Citus: {reason}"))


def activity(on_citus: bool) -> str:
    """Return the view of the sessions, on a cluster those of all nodes."""
    return "citus_stat_activity" if on_citus else "pg_stat_activity"


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
