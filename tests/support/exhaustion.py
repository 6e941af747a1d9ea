"""Servers that run out of connections or disk space."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

if TYPE_CHECKING:
    from support.servers import Server

TERMINATE_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> ALL(%s)
"""

FULL = """
CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'could not extend file: No space left on device' USING ERRCODE = '53100';
END $$
"""


def limit_connections(server: Server, connections: int) -> None:
    """Set the maximum number of connections of a server and restart it."""
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("ALTER SYSTEM SET max_connections = {}").format(connections))
        # The tests connect as a superuser, which may also use the reserved connections.
        admin.execute("ALTER SYSTEM SET max_wal_senders = 0")
    server.stop()
    server.start()


@contextmanager
def fill_up(dsn: str) -> Iterator[Callable[[], None]]:
    """Take all free connections of a server. Yield a function that also takes those of all other clients."""
    taken: list[psycopg.Connection] = []

    def take() -> None:
        while True:
            try:
                taken.append(psycopg.connect(dsn, autocommit=True))
            except psycopg.OperationalError:
                return

    def take_all() -> None:
        # Repeat until all connections are taken: pg_stat_activity does not list clients that are just connecting.
        [(limit,)] = taken[0].execute("SELECT current_setting('max_connections')::int").fetchall()
        while len(taken) < limit:
            taken[0].execute(TERMINATE_OTHERS, [[connection.info.backend_pid for connection in taken]])
            take()

    try:
        take()
        yield take_all
    finally:
        for connection in taken:
            connection.close()


class SmallDisk:
    """A file system of 4 MB that holds every table of a server."""

    def __init__(self, server: Server) -> None:
        self._folder = server.folder / "small"
        self._folder.mkdir()
        owner = server.folder.stat().st_uid
        try:
            self._mount(f"size=4m,mode=700,uid={owner}")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount a file system")
        try:
            with psycopg.connect(server.dsn, autocommit=True) as admin:
                location = sql.Literal(str(self._folder))
                admin.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(location))
                for kind in ("TABLE", "INDEX"):
                    admin.execute(f"ALTER {kind} ALL IN TABLESPACE pg_default SET TABLESPACE small")
        except BaseException:
            self.close()
            raise

    def grow(self) -> None:
        self._mount("remount,size=64m")

    def close(self) -> None:
        # A lazy unmount works while the server has files open.
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self._folder)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


class FullDisk:
    """A simulated full disk: while it is full, triggers on the tables raise SQLSTATE 53100 for each write."""

    def __init__(self, dsn: str, schema_name: str, tables: Sequence[sql.Identifier]) -> None:
        self.is_full = False
        self._dsn = dsn
        self._tables = tables
        self._function = sql.Identifier(schema_name, "full_disk")
        self._run([sql.SQL(FULL).format(function=self._function)])

    def fill(self) -> None:
        trigger = "CREATE TRIGGER full_disk AFTER INSERT OR UPDATE ON {} FOR EACH ROW EXECUTE FUNCTION {}()"
        self._run([sql.SQL(trigger).format(table, self._function) for table in self._tables])
        self.is_full = True

    def free(self) -> None:
        self._run([sql.SQL("DROP TRIGGER full_disk ON {}").format(table) for table in self._tables])
        self.is_full = False

    def _run(self, statements: Sequence[sql.Composed]) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as admin:
            for statement in statements:
                admin.execute(statement)
