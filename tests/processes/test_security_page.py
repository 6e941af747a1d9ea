"""The statements, commands and settings of docs/security.md, on real servers: policies, TLS, notifications."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import servers
from support.pages import find_block

from aibind_postgres import (
    ChatHistory,
    PostgresConversationStore,
    PostgresStreamStore,
    StreamNotFoundError,
    schema,
)
from aibind_postgres._notifications import digest_of
from aibind_postgres.cli.doctor_table_findings import MINIMAL_GRANTS

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")


def block(heading: str, language: str, number: int = 0) -> str:
    return find_block("security.md", heading, language, number)


def execute(dsn: str, text: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(text.encode())


@contextmanager
def new_role(database: str, *, grants: bool) -> Iterator[str]:
    """Create a role that may log in, with the minimal grants or none."""
    name = f"role_{os.urandom(6).hex()}"
    execute(database, f"CREATE ROLE {name} LOGIN")
    for table, privileges in MINIMAL_GRANTS.items() if grants else ():
        execute(database, f"GRANT {', '.join(privileges)} ON {table} TO {name}")
    try:
        yield name
    finally:
        execute(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


# Row-level security


@pytest.fixture
def tenants(database: str) -> Iterator[tuple[str, str]]:
    """Two roles on tables with the policies of the page."""
    execute(database, block("Row-level security", "sql"))
    with new_role(database, grants=True) as ann, new_role(database, grants=True) as bob:
        yield ann, bob


def test_example_of_a_tenant(database: str, tenants: tuple[str, str]) -> None:
    names = {
        "PostgresStreamStore": PostgresStreamStore,
        "dsn_of": lambda tenant: make_conninfo(database, user=tenant),
        "tenant": tenants[0],
    }
    exec(block("Row-level security", "python"), names)
    with names["store"] as store:
        assert [stream.owner for stream in store.list()] == [tenants[0]]


def test_a_tenant_can_use_its_own_rows(database: str, tenants: tuple[str, str]) -> None:
    dsn = make_conninfo(database, user=tenants[0])
    with PostgresStreamStore(dsn) as store, PostgresConversationStore(dsn) as conversations:
        stream = store.create(owner=tenants[0], session_id="s")
        with store.writer(stream) as writer:
            for _ in range(10):
                writer.text("a word ")
        assert [data for _, _, data in store.events(stream)] == ["a word "] * 10
        assert store.archive(0).chunks == 10
        assert len(list(store.read_from(stream))) == 10
        chat = ChatHistory()
        chat.append({"role": "user", "content": "Hello"})
        conversations.save("s", chat, owner=tenants[0])
        chat.append({"role": "assistant", "content": "Hello"})
        conversations.save("s", chat, owner=tenants[0])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conversations.save("s", chat)
        assert [info.session_id for info in conversations.list(tenants[0])] == ["s"]
        assert tuple(conversations.delete_owner(tenants[0], streams=store)) == (1, 1)


def test_a_tenant_does_not_see_rows_of_another_one(database: str, tenants: tuple[str, str]) -> None:
    ann, bob = (make_conninfo(database, user=tenant) for tenant in tenants)
    with PostgresStreamStore(ann) as store, PostgresConversationStore(ann) as conversations:
        active, ended = store.create(owner=tenants[0]), store.create(owner=tenants[0])
        store.append_many(ended, ["secret"] * 3)
        store.complete(ended)
        conversations.save("s", ChatHistory(), owner=tenants[0])
        with PostgresStreamStore(bob) as other, PostgresConversationStore(bob) as others:
            assert other.get_status(active) is None
            assert list(other.list()) == []
            calls = [
                lambda: other.append(active, "x"),
                lambda: other.stop(active),
                lambda: list(other.read_from(ended)),
            ]
            for refused in calls:
                with pytest.raises(StreamNotFoundError):
                    refused()
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                other.create(owner=tenants[0])
            other.delete(ended)
            assert list(others.list()) == []
            assert others.get_info("s") is None
            others.delete("s")
        assert [chunk.data for chunk in store.read_from(ended)] == ["secret"] * 3
        assert store.get_status(active).state == "active"
        assert conversations.get_info("s") is not None


def test_the_owner_of_the_tables_cleans_up_for_all_tenants(database: str, tenants: tuple[str, str]) -> None:
    with PostgresStreamStore(make_conninfo(database, user=tenants[0]), ttl=0.001) as store:
        store.complete(store.create(owner=tenants[0]))
    with PostgresStreamStore(database) as store:
        assert store.cleanup().streams == 1


# TLS


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[servers.Server, Path]]:
    """A server with the certificate and the settings of the page, and the folder of the authority."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["bash", "-euc", block("TLS", "sh", 1)], cwd=folder, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        for version in (os.environ.get("AIBIND_TEST_POSTGRES", "18"), "17", "15", "14"):
            if version not in servers.EMBEDDED_VERSIONS and not Path(f"/usr/lib/postgresql/{version}/bin").exists():
                continue
            patch.setenv("AIBIND_TEST_POSTGRES", version)
            with servers.own_server() as server:
                with psycopg.connect(server.dsn) as admin:
                    [configured] = admin.execute("SELECT setting FROM pg_config WHERE name = 'CONFIGURE'").fetchone()
                if "--with-openssl" not in configured and "--with-ssl" not in configured:
                    continue
                data = server.folder / "data"
                owner = data.stat()
                for name in ("server.crt", "server.key"):
                    (data / name).write_bytes((folder / name).read_bytes())
                    (data / name).chmod(0o600)
                    os.chown(data / name, owner.st_uid, owner.st_gid)
                with (data / "postgresql.conf").open("a") as settings:
                    settings.write(block("TLS", "ini"))
                rules = block("TLS", "", 0).replace("scram-sha-256", "trust")  # the roles have no passwords
                (data / "pg_hba.conf").write_text(rules)
                server.stop()
                server.start()
                yield server, folder
                return
    pytest.skip("needs a PostgreSQL that is built with OpenSSL, such as that of Debian")


def encrypted_dsn(server: servers.Server, **parameters: str) -> str:
    """Return the connection string of the page, for a server on this machine."""
    [documented] = re.findall(r"'(.*)'", block("TLS", "sh", 0))
    return make_conninfo(
        documented, hostaddr="127.0.0.1", port=server.port, user="postgres", dbname="postgres", **parameters
    )


def test_verify_full(encrypted: tuple[servers.Server, Path]) -> None:
    server, folder = encrypted
    dsn = encrypted_dsn(server, sslrootcert=str(folder / "ca.pem"))
    assert conninfo_to_dict(dsn)["sslmode"] == "verify-full"
    schema.migrate(dsn)
    with PostgresStreamStore(dsn) as store, store.writer(store.create("a")) as writer:
        reader = iter(store.read_from("a"))
        writer.write("encrypted")
        assert next(reader).data == "encrypted"
        with psycopg.connect(dsn) as admin:
            sessions = admin.execute(
                "SELECT query LIKE 'LISTEN%', ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE backend_type = 'client backend'"
            ).fetchall()
        reader.close()
    assert {encrypted for _, encrypted in sessions} == {True}
    assert len(sessions) > 1


@pytest.mark.parametrize("fault", ["another name", "another authority", "no encryption"])
def test_refused_connections(encrypted: tuple[servers.Server, Path], fault: str, tmp_path: Path) -> None:
    server, folder = encrypted
    authority = folder / "ca.pem"
    if fault == "another authority":
        command = block("TLS", "sh", 1).splitlines()[0]
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True, capture_output=True)
        authority = tmp_path / "ca.pem"
    dsn = encrypted_dsn(server, sslrootcert=str(authority))
    if fault == "another name":
        dsn = make_conninfo(dsn, host="other.example")
    if fault == "no encryption":
        dsn = make_conninfo(dsn, sslmode="disable")
    texts = {
        "another name": "does not match host name",
        "another authority": "certificate verify failed",
        "no encryption": "no pg_hba.conf entry",
    }
    with PostgresStreamStore(dsn) as store, pytest.raises(psycopg.OperationalError, match=texts[fault]):
        store.create()


# Notifications


def test_a_role_without_privileges_gets_digests_only(database: str) -> None:
    [channel] = re.findall(r"channel of the library, `(\w+)`", PAGE)
    with new_role(database, grants=False) as stranger:
        dsn = make_conninfo(database, user=stranger)
        with psycopg.connect(dsn, autocommit=True) as listener, PostgresStreamStore(database) as store:
            listener.execute(f"LISTEN {channel}")
            stream = store.create(owner="ann")
            store.append(stream, "a secret text")
            payload = next(iter(listener.notifies(timeout=30))).payload
            assert digest_of(stream) in payload.split()
            sender, *digests = payload.split()
            assert all(re.fullmatch(r"[0-9a-f]{32}", digest) for digest in digests)
            assert not {stream, "ann", "secret"} & {sender, *digests}


def test_strangers_cannot_connect(database: str) -> None:
    name = conninfo_to_dict(database)["dbname"]
    with new_role(database, grants=False) as stranger, new_role(database, grants=True) as app:
        statements = block("Notifications", "sql").replace(" mydb ", f" {name} ").replace(" TO app;", f" TO {app};")
        execute(database, statements)
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(make_conninfo(database, user=stranger))
        with PostgresStreamStore(make_conninfo(database, user=app)) as store:
            assert store.get_status(store.create()).state == "active"
