"""Releases of PostgreSQL, psycopg and PgBouncer with bugs or limits that matter here. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple


class Bug(NamedTuple):
    """A bug or a limit, with the first affected release, the first one without it, and a public source."""

    first: str
    fixed: str
    effect: str
    source: str


BUGS = {
    "PostgreSQL": [
        Bug(
            "14.0",
            "14.4",
            "CREATE INDEX CONCURRENTLY and REINDEX CONCURRENTLY may corrupt indexes: REINDEX those afterwards",
            "https://www.postgresql.org/docs/release/14.4/",
        ),
    ],
    "psycopg": [
        Bug(
            "3.0",
            "3.3.6",
            "a task that is cancelled while the server does not answer never ends",
            "https://github.com/psycopg/psycopg/issues/1371",
        ),
    ],
    "psycopg_pool": [
        Bug(
            "3.0",
            "3.3.3",
            "a synchronous pool stops working after a day without work",
            "https://github.com/psycopg/psycopg/issues/1419",
        ),
    ],
    "PgBouncer": [
        Bug(
            "1.0",
            "1.18.0",
            "a cancel request, as the option timeout of a store sends it, may cancel a statement of another client",
            "https://github.com/pgbouncer/pgbouncer/pull/717",
        ),
        Bug(
            "1.0",
            "1.21.0",
            "transaction pooling has no prepared statements: asyncpg and SQLAlchemy use them, stores on psycopg do not",
            "https://github.com/pgbouncer/pgbouncer/pull/845",
        ),
        Bug(
            "1.21.0",
            "1.22.1",
            "COPY FROM STDIN may leak memory and disturb prepared statements",
            "https://github.com/pgbouncer/pgbouncer/pull/1025",
        ),
        Bug(
            "1.23.0",
            "1.23.1",
            "PgBouncer may crash after it reloads its configuration",
            "https://github.com/pgbouncer/pgbouncer/pull/1105",
        ),
        Bug(
            "1.0",
            "1.25.2",
            "CVE-2026-6664: a malformed packet crashes PgBouncer, without a login",
            "https://www.pgbouncer.org/changelog.html",
        ),
    ],
}


def bugs_of(program: str, version: str) -> list[Bug]:
    """Return the bugs of a release, such as "3.3.6", of one of the programs in `BUGS`."""
    return [bug for bug in BUGS[program] if _numbers(bug.first) <= _numbers(version) < _numbers(bug.fixed)]


def newest(bugs: list[Bug]) -> str:
    """Return the first release without any of the bugs."""
    return max((bug.fixed for bug in bugs), key=_numbers)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
