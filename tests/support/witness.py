"""A witness at the commit: which setting of synchronous_commit each transaction has when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

# A deferred trigger runs at the end of the transaction, just before the commit.
WITNESS = """
CREATE TABLE {witness} (setting text);
CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {witness} VALUES (current_setting('synchronous_commit'));
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER witness AFTER INSERT OR UPDATE OR DELETE ON {status}
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {function}();
"""


@contextmanager
def witness(dsn: str, status_table: sql.Identifier, schema_name: str) -> Iterator[Callable[[], set[str]]]:
    """Watch the status table; give what returns the settings that were in force at the commits so far."""
    seen = sql.Identifier(schema_name, "witness")
    function = sql.Identifier(schema_name, "witnessed")
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL(WITNESS).format(witness=seen, function=function, status=status_table))

        def settings() -> set[str]:
            return {setting for (setting,) in admin.execute(sql.SQL("SELECT setting FROM {}").format(seen))}

        yield settings
