"""Records the setting of synchronous_commit at the commit of each transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

# A deferred trigger runs at the end of a transaction, just before the commit.
RECORD = """
CREATE TABLE {recorded} (setting text);
CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {recorded} VALUES (current_setting('synchronous_commit'));
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER record_setting AFTER INSERT OR UPDATE OR DELETE ON {status}
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {function}();
"""


@contextmanager
def record_commit_settings(
    dsn: str, status_table: sql.Identifier, schema_name: str
) -> Iterator[Callable[[], set[str]]]:
    """Record the setting at each change of the status table; yield a function that returns the recorded settings."""
    recorded = sql.Identifier(schema_name, "recorded_settings")
    function = sql.Identifier(schema_name, "record_setting")
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL(RECORD).format(recorded=recorded, function=function, status=status_table))

        def settings() -> set[str]:
            return {setting for (setting,) in admin.execute(sql.SQL("SELECT setting FROM {}").format(recorded))}

        yield settings
