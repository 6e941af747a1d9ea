"""PgBouncer in front of a server."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

BINARY = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))


@contextmanager
def pgbouncer(dsn: str, folder: Path, *, pool_size: int = 5, pool_mode: str = "transaction") -> Iterator[str]:
    """Start PgBouncer on a free port of the loopback interface, and yield the connection string of its database.

    All clients share `pool_size` server connections, which log in as the user of `dsn`.
    """
    target = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value}
    database = target.setdefault("dbname", "postgres")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    route = {name: target[name] for name in ("dbname", "host", "port", "user", "password") if name in target}
    config = folder / "pgbouncer.ini"
    config.write_text(
        "[databases]\n"
        f"{database} = {' '.join(f'{name}={_quoted(value)}' for name, value in route.items())}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = any\npool_mode = {pool_mode}\ndefault_pool_size = {pool_size}\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    config.chmod(0o600)
    assert BINARY is not None
    command = [BINARY, "-q", *_as_user(target.get("host", "")), str(config)]
    log = folder / "pgbouncer.log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, cwd="/") as process:
        try:
            pooled_dsn = make_conninfo(
                host="127.0.0.1", port=port, dbname=database, user=target.get("user", "postgres")
            )
            _wait_for(process, pooled_dsn, log)
            yield pooled_dsn
        finally:
            process.terminate()  # SIGINT would wait for clients to disconnect


def _as_user(host: str) -> list[str]:
    """Return the arguments that run PgBouncer as a user with access to the server, since it refuses to run as root."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwuid(os.stat(host).st_uid).pw_name if host.startswith("/") else "nobody"
    return ["-u", "nobody" if user == "root" else user]


def _wait_for(process: subprocess.Popen[bytes], dsn: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(dsn, connect_timeout=5).close()
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer does not respond: {log.read_text()}") from error
            time.sleep(0.05)
        else:
            return


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
