"""Findings with remedies about a server, the way to it, its settings and its streams. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

from .._tables import quote
from .._time_partitions import Partitions, overdue_days
from .doctor_facts import MAX_COUNTED, Facts, max_delay
from .known_bugs import bugs_of, newest

WELL, WARNINGS, WILL_NOT_WORK = 0, 1, 2  # exit codes

Level: TypeAlias = Literal["ok", "warning", "error"]

MINIMUM_VERSION = 140000
POOL_SIZE = 10  # connections of a store's own pool
MAX_CLOCK_DIFFERENCE = 5.0  # seconds
SLOW_NOTIFICATION = 500.0  # milliseconds
SHORT_TIMEOUT = 5_000  # milliseconds; a shorter statement_timeout interrupts `cleanup`

LIBPQ_CANCEL = "https://github.com/psycopg/psycopg/issues/534"


class Finding(NamedTuple):
    """One finding.

    Attributes:
        name: A stable name, for scripts.
        level: "ok", "warning", or "error" if the library will not work.
        text: The finding.
        remedy: The solution; None for level "ok".
    """

    name: str
    level: Level
    text: str
    remedy: str | None = None


def exit_code(findings: list[Finding]) -> int:
    """Return 0 if all is well, 1 for warnings, and 2 for errors."""
    levels = {finding.level for finding in findings}
    return WILL_NOT_WORK if "error" in levels else WARNINGS if "warning" in levels else WELL


def server_findings(facts: Facts) -> Iterator[Finding]:
    """Yield the findings about the server, the way to it, its settings and the streams."""
    yield from _server(facts)
    yield from _libraries(facts)
    yield from _path(facts)
    yield from _settings(facts.catalog)
    yield from _streams(facts)


def _server(facts: Facts) -> Iterator[Finding]:
    number = facts.catalog["server_version"]
    version = f"{number // 10000}.{number % 10000}"
    if number < MINIMUM_VERSION:
        yield Finding("server-version", "error", f"PostgreSQL {version}", "upgrade to PostgreSQL 14 or newer")
    else:
        yield Finding("server-version", "ok", f"PostgreSQL {version}")
    yield from _bugs("server-bug", "PostgreSQL", version)
    if facts.catalog["in_recovery"]:
        yield Finding(
            "read-only",
            "error",
            "the server is a hot standby: it accepts no writes and no LISTEN",
            "connect to the primary, such as with target_session_attrs=read-write and all hosts in the connection "
            "string; give a standby to the option replica of a store",
        )
    elif facts.catalog["is_read_only"]:
        yield Finding(
            "read-only",
            "error",
            "the sessions of this role are read-only",
            f"ALTER ROLE {quote(facts.catalog['role'])} RESET default_transaction_read_only; or check the same setting "
            "of the database and of the server",
        )


def _bugs(name: str, program: str, version: str) -> Iterator[Finding]:
    if bugs := bugs_of(program, version):
        effects = "; ".join(f"{bug.effect} ({bug.source})" for bug in bugs)
        yield Finding(
            name, "warning", f"{program} {version}: {effects}", f"upgrade to {program} {newest(bugs)} or newer"
        )


def _libraries(facts: Facts) -> Iterator[Finding]:
    yield from _bugs("psycopg-bug", "psycopg", facts.psycopg)
    yield from _bugs("psycopg-pool-bug", "psycopg_pool", facts.psycopg_pool)
    number = facts.libpq
    libpq = f"{number // 10000}.{number % 10000}"
    text = f"psycopg {facts.psycopg}, psycopg_pool {facts.psycopg_pool}, libpq {libpq}"
    if number < 170000:
        yield Finding(
            "libpq",
            "warning",
            f"{text}: before libpq 17, a cancel request has no time limit ({LIBPQ_CANCEL}), so the option timeout of a "
            "store closes the connection without cancelling the statement",
            "install psycopg[binary], or libpq 17 or newer",
        )
    else:
        yield Finding("libraries", "ok", text)


def _path(facts: Facts) -> Iterator[Finding]:
    path = facts.path
    if path.backend_pid == path.server_pid:
        yield Finding("connection", "ok", f"direct connection to {facts.host}, port {facts.port}")
    else:
        pooler = _pooler(facts.host, facts.pgbouncer)
        mode = "transaction pooling" if path.shares_sessions else "session pooling, as far as two connections show"
        yield Finding("connection", "ok", f"through {pooler}: {mode}")
        if facts.pgbouncer is not None:
            yield from _bugs("pooler-bug", "PgBouncer", facts.pgbouncer)
    if path.notification_ms is not None:
        slow = path.notification_ms > SLOW_NOTIFICATION
        yield Finding(
            "notifications",
            "warning" if slow else "ok",
            f"a notification took {path.notification_ms:.1f} ms between two connections",
            "check the load of the server, and listening sessions that stay in a transaction" if slow else None,
        )
    elif not facts.catalog["can_notify"]:
        yield Finding(
            "notifications",
            "warning",
            "the role may not call pg_notify, so readers in other processes poll",
            f"GRANT EXECUTE ON FUNCTION pg_catalog.pg_notify(text, text) TO {quote(facts.catalog['role'])};",
        )
    elif path.listen_error is not None or path.backend_pid == path.server_pid:
        reason = f" ({path.listen_error})" if path.listen_error else ""
        yield Finding(
            "notifications",
            "warning",
            f"no notification arrived within two seconds{reason}, so readers in other processes poll",
            "connect to the primary, and see its log",
        )
    else:
        yield Finding(
            "notifications",
            "warning",
            "the pooler passes on no notifications, so readers in other processes poll",
            "connect directly or through session pooling where readers follow streams: see docs/clients.md",
        )
    difference = abs(path.clock_difference)
    if difference - path.clock_uncertainty > MAX_CLOCK_DIFFERENCE:
        yield Finding(
            "clock",
            "warning",
            f"the clocks of the server and of this machine differ by {difference:.1f} s; leases and expiry use the "
            "server's clock",
            "synchronise both clocks by NTP",
        )
    else:
        yield Finding("clock", "ok", f"the clocks differ by {difference:.3f} s, ± {path.clock_uncertainty:.3f} s")


def _pooler(host: str, pgbouncer: str | None) -> str:
    if pgbouncer is not None:
        return f"PgBouncer {pgbouncer}"
    if host.endswith(".pooler.supabase.com"):
        return "Supavisor of Supabase"
    if host.endswith(".neon.tech"):
        return "PgBouncer of Neon"
    return "a pooler, such as PgBouncer"


def _settings(catalog: dict[str, Any]) -> Iterator[Finding]:
    settings = catalog["settings"]
    role = quote(catalog["role"])

    def number(name: str) -> int:
        return int(settings.get(name) or 0)

    closes = {
        "idle_session_timeout": "the server closes the connection of waiting readers and idle connections of a pool",
        "idle_in_transaction_session_timeout": "stores hold no transaction open, but a store on a connection of yours "
        "shares its transaction, which the server ends between two statements",
    }
    for name, effect in closes.items():
        value = number(name)
        if value and (name == "idle_session_timeout" or value < SHORT_TIMEOUT):
            yield Finding(name, "warning", f"{name} is {value} ms: {effect}", f"ALTER ROLE {role} SET {name} = 0;")
    for name in ("statement_timeout", "transaction_timeout"):
        if 0 < (value := number(name)) < SHORT_TIMEOUT:
            yield Finding(
                name,
                "warning",
                f"{name} is {value} ms: it may interrupt cleanup, which deletes 10,000 chunks in one statement",
                f"ALTER ROLE {role} SET {name} = '30s';",
            )
    available = number("max_connections") - number("superuser_reserved_connections")
    limit = catalog["role_connection_limit"]
    free = available - catalog["connections"]
    if 0 <= limit < POOL_SIZE + 1:
        yield Finding(
            "connections",
            "warning",
            f"the role may open {limit} connections; a store opens up to {POOL_SIZE + 1}",
            f"ALTER ROLE {role} CONNECTION LIMIT -1; or give the store a smaller pool",
        )
    elif free < POOL_SIZE + 1:
        yield Finding(
            "connections",
            "warning",
            f"{free} of {available} connections are free; a store opens up to {POOL_SIZE + 1} in each process",
            "raise max_connections, use a pooler, or give the stores of a process one smaller pool",
        )
    lost = "a crash of the machine loses or corrupts acknowledged chunks"
    kept = "dead rows of the table of streams are not removed"
    for name, effect in {"fsync": lost, "full_page_writes": lost, "autovacuum": kept, "track_counts": kept}.items():
        if settings.get(name) == "off":
            yield Finding(
                name, "warning", f"{name} is off: {effect}", f"ALTER SYSTEM RESET {name}; SELECT pg_reload_conf();"
            )
    if settings.get("synchronous_commit") == "off":
        yield Finding(
            "synchronous_commit",
            "warning",
            "synchronous_commit is off: a crash of the server loses the last acknowledged chunks",
            f"ALTER ROLE {role} SET synchronous_commit = on; or accept the loss",
        )
    if (isolation := settings.get("default_transaction_isolation")) != "read committed":
        yield Finding(
            "isolation",
            "warning",
            f"default_transaction_isolation is {isolation}: simultaneous writers get serialization errors",
            f"ALTER ROLE {role} SET default_transaction_isolation = 'read committed';",
        )
    if (encoding := settings.get("server_encoding")) != "UTF8":
        yield Finding(
            "encoding",
            "warning",
            f"the encoding of the database is {encoding}: other characters are refused",
            "create a database with ENCODING 'UTF8' and move the tables there",
        )


def _streams(facts: Facts) -> Iterator[Finding]:
    if facts.time_partitions is not None:
        yield from _time_partitions(facts.time_partitions, facts.catalog["role"])
    age = "an hour" if facts.time_partitions is None else f"{max_delay(facts.time_partitions).days} days"
    texts = {
        "abandoned": ("active streams have no living producer", "run a Housekeeper, or call fail_abandoned()"),
        "expired": (f"streams expired more than {age} ago", "run a Housekeeper, or call cleanup()"),
        "too_long": ("streams have more than 1,000,000 chunks", "store longer chunks, or divide the streams"),
    }
    for name, count in (facts.streams or {}).items():
        if count:
            text, remedy = texts[name]
            number = f"{MAX_COUNTED} or more" if count >= MAX_COUNTED else str(count)
            yield Finding(f"{name.replace('_', '-')}-streams", "warning", f"{number} {text}", remedy)


def _time_partitions(tables: list[Partitions], role: str) -> Iterator[Finding]:
    if missing := overdue_days(tables):
        yield Finding(
            "missing-partitions",
            "warning",
            f"partitions of {len(missing)} days are missing, the first one of {missing[0]}: streams are in DEFAULT",
            "run a Housekeeper with a role that owns the tables",
        )
    if not all(table.may_change for table in tables):
        yield Finding(
            "partition-owner",
            "ok",
            f"the role {role} may not create and drop partitions: the Housekeeper needs another role, the owner",
        )
