"""Gather the facts about a server, its tables and the way to them, from which `doctor_findings` derives findings."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
from psycopg import pq
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from .._conninfo import with_defaults
from .._housekeeping import MARKER
from .._tables import CHUNKS_TABLE, STATUS_TABLE, Table, literal
from .._time_partitions import MAX_WAIT, PARTITIONS, Partitions, parse_partitions, wanted

NOTIFICATION_TIMEOUT = 2.0  # seconds
STATEMENT_TIMEOUT = 10_000  # milliseconds; for the statements on the rows of the streams
MAX_DELAY = timedelta(hours=1)  # of the deletion of an expired stream
MAX_COUNTED = 1000  # streams of each kind; more take long on a large table

SETTINGS = [
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
    "statement_timeout",
    "transaction_timeout",
    "max_connections",
    "superuser_reserved_connections",
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "default_transaction_isolation",
    "server_encoding",
    "track_counts",
    "autovacuum",
]

# One statement, which reads catalogs only. A table is found by its name without `to_regclass`, which fails without the
# privilege USAGE on the schema.
CATALOG = """
SELECT jsonb_build_object(
  'server_version', current_setting('server_version_num')::int,
  'role', current_user,
  'database', current_database(),
  'search_path', current_setting('search_path'),
  'in_recovery', pg_is_in_recovery(),
  'is_read_only', current_setting('transaction_read_only') = 'on',
  'connections', (SELECT count(*) FROM pg_stat_activity WHERE datname IS NOT NULL),
  'role_connection_limit', (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user),
  'settings', (SELECT jsonb_object_agg(name, setting) FROM pg_settings WHERE name = ANY (%(settings)s)),
  'can_notify', has_function_privilege('pg_catalog.pg_notify(text, text)', 'EXECUTE'),
  'tables', (
    SELECT coalesce(jsonb_agg(jsonb_build_object(
      'key', wanted.key,
      'schema', nspname,
      'name', relname,
      'is_visible', wanted.schema IS NOT NULL OR pg_table_is_visible(c.oid),
      'has_usage', has_schema_privilege(n.oid, 'USAGE'),
      'row_security', relrowsecurity,
      'bypasses_row_security', NOT row_security_active(c.oid),
      'policies', (SELECT count(*) FROM pg_policy WHERE polrelid = c.oid),
      'columns', (
        SELECT jsonb_object_agg(attname, jsonb_build_object('type', format_type(atttypid, NULL), 'default', atthasdef))
          FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
      ),
      'indexes', (
        SELECT coalesce(jsonb_object_agg(i.relname, indisvalid AND indisready), '{}')
          FROM pg_index JOIN pg_class AS i ON i.oid = indexrelid WHERE indrelid = c.oid
      ),
      'has_primary_key', EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary),
      'privileges', (
        SELECT coalesce(jsonb_agg(privilege), '[]')
          FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
         WHERE has_table_privilege(c.oid, privilege)
      ),
      'grants', (
        SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_array(coalesce(rolname, 'PUBLIC'), privilege_type)), '[]')
          FROM aclexplode(relacl) LEFT JOIN pg_roles ON pg_roles.oid = grantee
         WHERE grantee <> relowner
      ),
      'partition_key', CASE WHEN relkind = 'p' THEN pg_get_partkeydef(c.oid) END,
      'leaves', (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
            'name', s.relid::regclass::text, 'size', pg_relation_size(s.relid),
            'live', n_live_tup, 'dead', n_dead_tup, 'last_vacuum', greatest(last_vacuum, last_autovacuum)
          ) ORDER BY n_dead_tup DESC, s.relid), '[]')
          FROM pg_stat_user_tables AS s
         WHERE (s.relid = c.oid AND relkind <> 'p')
            OR s.relid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf)
      )
    )), '[]')
      FROM jsonb_to_recordset(%(tables)s) AS wanted (key text, schema text, name text)
      JOIN pg_class AS c ON relname = wanted.name AND relkind IN ('r', 'p', 'v', 'm', 'f')
      JOIN pg_namespace AS n ON n.oid = relnamespace AND nspname = coalesce(wanted.schema, nspname)
     WHERE nspname NOT LIKE 'pg\\_%%'
  ),
  'citus', to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL
)
"""

# Streams in bad states. Each subquery stops after a number of rows. Times are milliseconds of the server's clock.
STREAMS = """
WITH clock AS (SELECT (extract(epoch FROM statement_timestamp()) * 1000)::bigint AS now)
SELECT jsonb_build_object(
  'abandoned', (
    SELECT count(*) FROM (SELECT FROM {status} WHERE state = 'active' AND {abandoned} LIMIT {limit}) AS abandoned
  ),
  'expired', (
    SELECT count(*) FROM (
      SELECT FROM {status} WHERE state <> 'active' AND expires_at <= now - {delay} AND id <> {marker} LIMIT {limit}
    ) AS expired
  ),
  'too_long', (
    SELECT count(*) FROM (SELECT FROM {status} WHERE total_chunks > 1000000 LIMIT {limit}) AS too_long
  )
) FROM clock
"""


class Path(NamedTuple):
    """The way to the server, as seen from two connections.

    Attributes:
        backend_pid: The process id that the connection reports.
        server_pid: The process id that the server reports. It differs behind a pooler.
        shares_sessions: Whether both connections used one session of the server.
        notification_ms: The milliseconds from NOTIFY to its arrival on the other connection; None if it did not arrive.
        listen_error: The class of the error that LISTEN or NOTIFY raised.
        clock_difference: Seconds by which the server's clock is ahead of this machine's.
        clock_uncertainty: Seconds by which that may be wrong: half a round trip.
    """

    backend_pid: int
    server_pid: int
    shares_sessions: bool
    notification_ms: float | None
    listen_error: str | None
    clock_difference: float
    clock_uncertainty: float


class Facts(NamedTuple):
    """Everything from which findings are derived."""

    host: str
    port: int
    path: Path
    catalog: dict[str, Any]
    streams: dict[str, int] | None  # None if the table of streams cannot be read
    psycopg: str
    psycopg_pool: str
    libpq: int
    pgbouncer: str | None = None  # the version, if the role may ask for it
    time_partitions: list[Partitions] | None = None  # of the tables of streams, if they are partitioned by time


def max_delay(time_partitions: list[Partitions] | None) -> timedelta:
    """Return the time after which an expired stream should be deleted. Partitions of days are dropped as a whole."""
    return MAX_DELAY if time_partitions is None else MAX_DELAY + MAX_WAIT


def gather(dsn: str, tables: dict[str, Table]) -> Facts:
    """Gather the facts over two connections, opened as a store opens its own.

    Args:
        dsn: The connection string.
        tables: The tables by their default names.

    Raises:
        psycopg.Error: The server cannot be reached, or refuses to show its catalogs.
    """
    complete = with_defaults(dsn)
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(psycopg.connect(complete, autocommit=True, prepare_threshold=None)) for _ in range(2)
        )
        names = [{"key": key, "schema": table.schema, "name": table.name} for key, table in tables.items()]
        row = first.execute(CATALOG, {"settings": SETTINGS, "tables": Jsonb(names)}).fetchone()
        assert row is not None
        path = _examine_path(first, second)
        partitions = _time_partitions(first, [tables[STATUS_TABLE], tables[CHUNKS_TABLE]])
        return Facts(
            host=first.info.host or "localhost",
            port=first.info.port,
            path=path,
            catalog=row[0],
            streams=_count_streams(first, tables[STATUS_TABLE], row[0], max_delay(partitions)),
            psycopg=psycopg.__version__,
            psycopg_pool=psycopg_pool.__version__,
            libpq=pq.version(),
            pgbouncer=None if path.backend_pid == path.server_pid else _pgbouncer_version(complete),
            time_partitions=partitions,
        )


def _time_partitions(connection: psycopg.Connection, tables: list[Table]) -> list[Partitions] | None:
    """Return the partitions of tables by time, or None for other tables and those that cannot be examined."""
    try:
        with psycopg.RawCursor(connection) as cursor:
            rows = {row[0]: row for row in cursor.execute(PARTITIONS, [wanted(tables)])}
    except psycopg.Error:
        return None
    found = [parse_partitions(rows[table.quoted], table) for table in tables if table.quoted in rows]
    return found or None


def _examine_path(first: psycopg.Connection, second: psycopg.Connection) -> Path:
    pid = _server_pid(first)
    shares = _server_pid(second) == pid or _server_pid(first) != pid
    started = time.time()
    row = first.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert row is not None
    ended = time.time()
    notification_ms, error = _send_notification(first, second)
    return Path(
        backend_pid=first.info.backend_pid,
        server_pid=pid,
        shares_sessions=shares,
        notification_ms=notification_ms,
        listen_error=error,
        clock_difference=row[0] - (started + ended) / 2,
        clock_uncertainty=(ended - started) / 2,
    )


def _pgbouncer_version(conninfo: str) -> str | None:
    """Return the version of PgBouncer. None if the role may not use its console, or for another pooler."""
    try:
        with psycopg.connect(make_conninfo(conninfo, dbname="pgbouncer"), autocommit=True) as console:
            row = console.execute("SHOW VERSION").fetchone()
    except psycopg.Error:
        return None
    return None if row is None else str(row[0]).rpartition(" ")[2]


def _server_pid(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


def _send_notification(receiver: psycopg.Connection, sender: psycopg.Connection) -> tuple[float | None, str | None]:
    channel = f"aibind_doctor_{uuid.uuid4().hex}"
    try:
        receiver.execute(f'LISTEN "{channel}"')
        try:
            started = time.monotonic()
            sender.execute("SELECT pg_notify(%s, '')", [channel])
            received = list(receiver.notifies(timeout=NOTIFICATION_TIMEOUT, stop_after=1))
            ended = time.monotonic()
        finally:
            receiver.execute(f'UNLISTEN "{channel}"')  # a pooler may give the session to another client
    except psycopg.Error as failure:
        return None, type(failure).__name__
    return (ended - started) * 1000 if received else None, None


def _count_streams(
    connection: psycopg.Connection, status: Table, catalog: dict[str, Any], delay: timedelta
) -> dict[str, int] | None:
    found = next((t for t in catalog["tables"] if t["key"] == STATUS_TABLE and t["is_visible"]), None)
    if found is None or not found["has_usage"] or "SELECT" not in found["privileges"]:
        return None
    has_leases = "lease_until" in (found["columns"] or {})
    old = "expires_at <= now - 3600000"
    text = STREAMS.format(
        status=status.quoted,
        abandoned=f"coalesce(lease_until <= now - 600000, {old})" if has_leases else old,
        delay=round(delay.total_seconds() * 1000),
        marker=literal(MARKER),
        limit=MAX_COUNTED,
    )
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT}")
            row = connection.execute(text.encode()).fetchone()
    except psycopg.Error:
        return None
    return None if row is None else row[0]
