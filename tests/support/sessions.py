"""Sessions that the server ends or makes read-only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

# Ends the connections to this database, except its own and those with the application name "stays".
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name <> 'stays'
"""


@contextmanager
def read_only_sessions(dsn: str) -> Iterator[None]:
    """End all sessions except those with the name "stays". Sessions that begin inside the block stay read-only.

    This is what a client meets during a failover or an upgrade.
    """
    with psycopg.connect(dsn, autocommit=True) as admin:
        name = sql.Identifier(admin.info.dbname)
        admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        try:
            admin.execute(TERMINATE)
            yield
        finally:
            admin.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
