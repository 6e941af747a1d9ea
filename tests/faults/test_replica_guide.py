"""The code and the connection strings of docs/replicas.md, on a primary with a synchronous standby."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import servers
from support.concurrency import until

from aibind_postgres import PostgresStreamStore, StreamNotActiveError

pytestmark = pytest.mark.timeout(300)

PAGE = (Path(__file__).parents[2] / "docs" / "replicas.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [block for name, block in BLOCKS if name == language]


def run(script, primary, standby):
    environment = {**os.environ, "DATABASE_URL": primary.dsn, "REPLICA_URL": standby.dsn}
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def on_these_servers(string, *these):
    """Return a connection string of the page with the addresses of these servers."""
    parameters = conninfo_to_dict(string)
    assert parameters["host"] == "one,two,three"
    ports = ",".join(str(server.port) for server in these)
    others = {"user": "postgres", "dbname": "postgres", "host": ",".join("127.0.0.1" for _ in these), "port": ports}
    return make_conninfo("", **{**parameters, **others})


def test_every_block_is_tested():
    assert [name for name, _ in BLOCKS] == ["python", "", "sql", "python"]


def test_guide(disposable_server):
    primary = disposable_server
    with servers.standby_of(primary) as standby, psycopg.connect(primary.dsn, autocommit=True) as admin:
        [synchronous] = blocks("sql")
        with psycopg.connect(standby.dsn, autocommit=True) as replaying:
            replaying.execute("ALTER SYSTEM SET cluster_name = 'two'")
        standby.stop()
        standby.start()
        for statement in filter(None, map(str.strip, synchronous.split(";"))):
            admin.execute(statement)
        found = "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'quorum'"
        until(lambda: admin.execute(found).fetchall() == [("two",)], 60)

        with_replica, on_standby = blocks("python")
        assert run(with_replica, primary, standby) == "Hello, world\n"
        with PostgresStreamStore(primary.dsn, synchronous_commit="remote_apply") as store:
            id = store.create()
            store.append(id, "x")
            store.fail(id, "later than the stream above")
            # A standby with `remote_apply` has every acknowledged change.
            with PostgresStreamStore(standby.dsn) as reading:
                assert [chunk.data for chunk in reading.read_from(id)] == ["x"]
        assert run(on_standby, primary, standby) == "3 Hello, world\n"

        [strings] = blocks("")
        writing, replicas = strings.splitlines()
        for these in ((primary, standby), (standby, primary)):
            for string, in_recovery in ((writing, False), (replicas, True)):
                with psycopg.connect(on_these_servers(string, *these)) as connection:
                    assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (in_recovery,)

        # The failover.
        pools = [on_these_servers(string, primary, standby) for string in (writing, replicas)]
        with PostgresStreamStore(pools[0], replica=pools[1]) as store:
            id = store.create()
            texts = [str(number) for number in range(200)]
            store.append_many(id, texts)
            store.complete(id)
            assert [chunk.data for chunk in store.read_from(id)] == texts
            primary.kill()
            standby.promote()
            assert [chunk.data for chunk in store.read_from(id)] == texts
            with pytest.raises(StreamNotActiveError):
                store.append(id, "x")
