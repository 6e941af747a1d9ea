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
from support.skips import skip_named

# The tests that are skipped, by the reason: files, functions, or a single variant of a function.
IMPOSSIBLE = {
    "it has no triggers on distributed tables": [
        "test_clients::test_error_of_the_commit_raises",
        "test_clients::test_row_that_cannot_be_updated",
        "test_deletion::test_cleanup_deletes_at_most_10_000_chunks_at_once",
        "test_deletion::test_cleanup_of_conversations_is_bounded_in_bytes",
        "test_deletion::test_delete_deletes_at_most_10_000_chunks_at_once",
        "test_deletion::test_fail_abandoned_ends_at_most_1_000_streams_at_once",
        "test_deletion::test_recreated_stream_deletes_at_most_10_000_leftover_chunks_at_once",
        "test_housekeeping::test_refused_marker",
        "test_housekeeping::test_turns_are_a_period_apart",
        "test_leases::test_reader_tries_again_after_a_refusal",
        "test_leases::test_refusal_for_the_moment_is_no_outage",
        "test_live_reading::test_notifications_contain_no_stream_id[trigger]",
        "test_live_reading::test_trigger_notifies_for_foreign_writers",
        "test_producing::test_error_on_closing_the_source_is_not_exposed",
        "test_synchronous_commit::test_default_of_the_server",
        "test_pgbouncer::test_synchronous_commit",
        "test_synchronous_commit::test_every_write_uses_the_option",
    ],
    "each append, live read and renewal has a statement of its own": [
        "test_combined_appends::test_appends_to_many_streams_share_a_statement",
        "test_combined_appends::test_appends_to_one_stream_share_a_statement",
        "test_combined_appends::test_batch_with_unknown_outcome_is_not_repeated",
        "test_combined_appends::test_close_rejects_queued_appends",
        "test_combined_appends::test_each_append_gets_its_own_error",
        "test_combined_appends::test_locked_stream_delays_no_other",
        "test_combined_appends::test_one_of_two_appends_with_the_same_number_raises",
        "test_combined_appends::test_rejected_batch_raises_only_in_the_append_at_fault",
        "test_combined_appends::test_simultaneous_consecutive_numbers",
        "test_combined_appends::test_simultaneous_identical_appends_write_once",
        "test_leases::test_one_statement_renews_all_leases",
        "test_page_sizes::test_pages_of_a_shared_statement_are_bounded_together",
        "test_stats::test_appends_that_share_a_statement",
    ],
    "the stores do not try what it refuses": [
        "test_distributed_tables::test_conversations",
        "test_distributed_tables::test_expired_leases_end_the_streams",
        "test_distributed_tables::test_leases_are_renewed_one_by_one",
        "test_distributed_tables::test_leftover_chunks_are_deleted",
        "test_distributed_tables::test_refusal_in_a_transaction_of_the_caller_is_raised",
        "test_distributed_tables::test_refused_statement_is_tried_once",
    ],
    "it cannot archive": ["test_housekeeping::test_archiving_only_if_it_is_wanted"],
    "all migrations are needed": [
        "test_clients::test_without_the_second_migration",
        "test_conversation_details::test_conversations_of_before_the_migration_come_last",
        "test_conversation_details::test_migration_is_looked_up_once_and_found_when_it_is_needed",
        "test_leftover_chunks::test_append_on_a_connection_to_a_recreated_stream[without times]",
        "test_leftover_chunks::test_append_to_a_recreated_stream[without times]",
        "test_leftover_chunks::test_simultaneous_appends_to_recreated_streams[without times]",
        "test_stream_details::test_everything_else_works_without_the_migration",
        "test_stream_details::test_migration_is_found_when_it_is_needed",
    ],
    "its results are not in the encoding and the DateStyle of the session": [
        "test_connection_states::test_changed_encoding",
        "test_connection_states::test_changed_settings",
        "test_following::test_unreadable_text_affects_only_its_own_stream",
    ],
    "the role of the test cannot log in to the workers": [
        "test_caller_settings::test_polled_reader_under_row_level_security",
        "test_caller_settings::test_readers_of_two_tenants_share_statements",
        "test_caller_settings::test_writer_sends_with_the_settings_of_its_caller",
        "test_conversation_details::test_active_stream_without_the_right_to_read_it",
        "test_django::test_refused_notification",
        "test_refused_notifications::test_append_in_a_transaction_raises",
        "test_refused_notifications::test_pool_warns_once",
        "test_refused_notifications::test_refused_probe_does_not_slow_polls",
        "test_refused_notifications::test_store_that_does_not_notify",
        "test_refused_notifications::test_writes_on_an_autocommit_connection",
    ],
    "the SQLSTATE of a refused row is lost": ["test_deletion::test_tables_that_refuse_tombstones"],
    "a database contains its own tables and functions": ["test_schema"],
    "plans are for several servers": ["test_statements"],
    "statistics, locks and sessions are on the workers": [
        "test_timeout::test_callers_busy_connection_stays_open",
        "test_concurrent_writers::test_appends_are_heap_only_updates",
        "test_live_reading::test_waiting_readers_use_one_connection",
        "test_prepared_statements::test_returned_connection_serves_a_waiting_call",
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
    skip_named(items, IMPOSSIBLE, "on Citus")


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
        with _one_at_a_time(cluster), psycopg.connect(dsn, autocommit=True) as coordinator:
            info = coordinator.info
            coordinator.execute("SELECT citus_set_coordinator_host(%s, %s)", [info.host, info.port])
            for host, port in cluster.workers:
                coordinator.execute("SELECT citus_add_node(%s, %s)", [host, port])
        if migrated:
            schema.migrate(dsn, citus=True)
        yield dsn


@contextmanager
def _one_at_a_time(cluster: Cluster) -> Iterator[None]:
    """Wait for other processes of the tests: adding a node changes the roles, which all databases of a server share."""
    with psycopg.connect(cluster.coordinator, autocommit=True) as lock:
        lock.execute("SELECT pg_advisory_lock(hashtext('tests of aibind_postgres'))")
        yield


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
