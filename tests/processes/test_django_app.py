"""The app for Django in real projects: migrations, tests of applications, checks and commands."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from urllib.request import Request, urlopen

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import django_project, servers
from support.django_project import manage, must_manage

from aibind_postgres import PostgresConversationStore, PostgresStreamStore, schema
from aibind_postgres.wire import INTERRUPTED

TABLES = {"aibind_conversations", "aibind_stream_chunks", "aibind_stream_chunks_archive", "aibind_stream_status"}
COLUMNS = """
SELECT table_name, column_name, data_type, column_default FROM information_schema.columns
 WHERE table_name LIKE 'aibind\\_%' ORDER BY 1, 2
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE tablename LIKE 'aibind\\_%' ORDER BY 1"
OWN_NAMES = """
AIBIND_POSTGRES = {
    "CHUNKS_TABLE": "chat.chunks",
    "STATUS_TABLE": "chat.status of streams",
    "CONVERSATIONS_TABLE": "Conversations",
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return django_project.write(tmp_path_factory.mktemp("django") / "project")


def query(dsn: str, sql: str) -> list[tuple]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


def tables(dsn: str) -> set[str]:
    return {name for (name,) in query(dsn, "SELECT tablename FROM pg_tables WHERE tablename LIKE 'aibind\\_%'")}


def test_migrations_create_the_same_schema(project: Path, empty_database: str, database: str) -> None:
    output = must_manage(project, empty_database, "migrate")
    assert "Applying aibind_postgres.0005_archive... OK" in output
    for sql in (COLUMNS, INDEXES):
        assert query(empty_database, sql) == query(database, sql)
    assert "No changes detected" in must_manage(project, empty_database, "makemigrations", "--check", "--dry-run")
    assert "No migrations to apply" in must_manage(project, empty_database, "migrate")


REVERSAL = """
from django.core.management import call_command
from django.db import connection
from aibind_postgres import PostgresStreamStore, wrap_django

def describe():
    with connection.cursor() as cursor:
        return [cursor.execute(sql).fetchall() for sql in (COLUMNS, INDEXES)]

def migrate(name):
    call_command("migrate", "aibind_postgres", name, verbosity=0)

names = [f"000{number}" for number in range(1, 6)]
states = []
for name in names:
    migrate(name)
    states.append(describe())
store = PostgresStreamStore(wrap_django())
store.append(store.create(), "text")
for name, state in zip(reversed(names), reversed(states)):
    migrate(name)
    assert describe() == state, name
migrate("zero")
"""
SQL = """
from django.core.management import call_command

for number in range(1, 6):
    call_command("sqlmigrate", "aibind_postgres", f"000{number}", backwards=BACKWARDS)
"""


def test_each_migration_can_be_reversed(project: Path, empty_database: str) -> None:
    code = f"COLUMNS, INDEXES = {COLUMNS!r}, {INDEXES!r}\n{REVERSAL}"
    must_manage(project, empty_database, "shell", "-c", code)
    assert tables(empty_database) == set()
    must_manage(project, empty_database, "migrate")
    assert tables(empty_database) == TABLES


def test_sql_of_sqlmigrate_runs(project: Path, empty_database: str) -> None:
    query(empty_database, must_manage(project, empty_database, "shell", "-v0", "-c", f"BACKWARDS = False\n{SQL}"))
    assert tables(empty_database) == TABLES
    sql = must_manage(project, empty_database, "shell", "-v0", "-c", f"BACKWARDS = True\n{SQL}")
    assert sql.count("DROP TABLE") == 2


def test_migrations_of_existing_tables(project: Path, empty_database: str) -> None:
    schema.migrate(empty_database, partitions=4)
    before = query(empty_database, COLUMNS)
    must_manage(project, empty_database, "migrate")
    assert query(empty_database, COLUMNS) == before


def test_names_of_the_settings(tmp_path: Path, empty_database: str) -> None:
    project = django_project.write(tmp_path / "project", OWN_NAMES)
    query(empty_database, "CREATE SCHEMA chat")
    must_manage(project, empty_database, "migrate")
    assert tables(empty_database) == set()
    with PostgresStreamStore(
        empty_database, chunks_table="chat.chunks", status_table="chat.status of streams"
    ) as store:
        store.create("a stream")
        assert "active" in must_manage(project, empty_database, "aibind", "show", "a stream")
    assert "No changes detected" in must_manage(project, empty_database, "makemigrations", "--check", "--dry-run")
    code = (
        "from aibind_postgres.contrib.django.models import *; print(Stream.objects.get(), Conversation.objects.count())"
    )
    assert "a stream 0\n" in must_manage(project, empty_database, "shell", "-c", code)
    must_manage(project, empty_database, "migrate", "aibind_postgres", "zero")
    assert query(empty_database, "SELECT * FROM pg_tables WHERE schemaname = 'chat'") == []


@pytest.mark.parametrize("options", [(), ("--parallel=2",)], ids=["one process", "parallel"])
def test_tests_of_an_application(project: Path, server: str, empty_database: str, options: tuple[str, ...]) -> None:
    name = f"test_{uuid.uuid4().hex}"
    must_manage(project, empty_database, "migrate")
    done = manage(project, empty_database, "test", *options, TEST_NAME=name)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Ran \d\d tests", done.stderr), done.stderr
    for table in TABLES:
        assert query(empty_database, f"SELECT * FROM {table}") == []
    assert query(server, f"SELECT datname FROM pg_database WHERE datname LIKE '{name}%'") == []


def test_tests_without_migrations(tmp_path: Path, empty_database: str) -> None:
    settings = f'{OWN_NAMES.replace("chat.", "")}\nDATABASES["default"]["TEST"]["MIGRATE"] = False'
    project = django_project.write(tmp_path / "project", settings)
    arguments = ("test", "chat.tests.InTransaction.test_request", "chat.tests.Committed")
    done = manage(project, empty_database, *arguments, TEST_NAME=f"test_{uuid.uuid4().hex}")
    assert done.returncode == 0, done.stderr


def test_tests_without_a_database(project: Path, database: str) -> None:
    done = manage(project, database, "test", "chat.tests.WithoutDatabase")
    assert done.returncode == 0, done.stderr
    assert "Creating test database" not in done.stderr
    with PostgresStreamStore(database) as store:
        assert list(store.list()) == []


def test_invalid_settings(tmp_path: Path, database: str) -> None:
    settings = 'AIBIND_POSTGRES = {"CHUNK_TABLE": "chunks", "STATUS_TABLE": ""}'
    done = manage(django_project.write(tmp_path / "project", settings), database, "check")
    assert done.returncode == 1
    assert "(aibind_postgres.E001) AIBIND_POSTGRES has the unknown key 'CHUNK_TABLE'" in done.stderr
    assert "AIBIND_POSTGRES['STATUS_TABLE']: a table name or schema name must not be empty" in done.stderr


def test_database_that_is_not_postgresql(tmp_path: Path, database: str) -> None:
    settings = """
DATABASES["default"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}
ROOT_URLCONF = "mysite.empty"
"""
    project = django_project.write(tmp_path / "project", settings)
    (project / "mysite" / "empty.py").write_text("urlpatterns = []", "utf-8")
    done = manage(project, database, "check")
    assert done.returncode == 1
    assert "(aibind_postgres.E002)" in done.stderr
    assert "DATABASE_ROUTERS" in done.stderr
    assert "must have the vendor postgresql, not sqlite" in manage(project, database, "aibind", "list").stderr


def test_tables_that_cannot_be_checked(project: Path) -> None:
    done = manage(project, "postgresql://me:secret@127.0.0.1:1/real", "check", "--database", "default")
    assert "aibind_postgres.W002" in done.stderr
    assert "refused" in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_missing_tables(project: Path, empty_database: str) -> None:
    done = manage(project, empty_database, "check", "--database=default")
    assert done.returncode == 0
    assert "(aibind_postgres.W001) The database 'default' has no tables \"aibind_stream_chunks\"" in done.stderr
    assert "HINT: Run `manage.py migrate aibind_postgres`." in done.stderr
    must_manage(project, empty_database, "migrate")
    assert manage(project, empty_database, "check", "--database=default").stderr == ""


def test_second_database_with_a_router(tmp_path: Path, server: str, empty_database: str) -> None:
    with servers.own_database(server, "template0") as other:
        project = django_project.write(
            tmp_path / "project",
            """
other = conninfo_to_dict(os.environ["OTHER"])
DATABASES["chats"] = {**DATABASES["default"], "NAME": other["dbname"]}
DATABASE_ROUTERS = ["mysite.router.Router"]
""",
        )
        (project / "mysite" / "router.py").write_text(
            """
class Router:
    def db_for_read(self, model, **hints):
        return "chats" if model._meta.app_label == "aibind_postgres" else None

    db_for_write = db_for_read

    def allow_migrate(self, db, app_label, **hints):
        return (db == "chats") == (app_label == "aibind_postgres")
""",
            "utf-8",
        )
        must_manage(project, empty_database, "migrate", OTHER=other)
        must_manage(project, empty_database, "migrate", "--database=chats", OTHER=other)
        assert tables(empty_database) == set()
        assert tables(other) == TABLES
        with PostgresStreamStore(other) as store:
            store.create("there")
        arguments = ("aibind", "--database=chats", "show", "there")
        assert "active" in must_manage(project, empty_database, *arguments, OTHER=other)


def test_commands(project: Path, database: str) -> None:
    done = manage(project, database, "aibind", "show", "unknown")
    assert (done.returncode, done.stdout) == (3, "")
    assert "stream 'unknown' not found" in done.stderr
    with PostgresStreamStore(database) as store:
        store.append(store.create("known"), "Hello")
        store.complete("known")
    assert "done" in must_manage(project, database, "aibind", "show", "known", "--settings=mysite.settings")
    assert must_manage(project, database, "aibind", "tail", "known") == "Hello"
    for arguments in (("help", "aibind"), ("aibind", "--help")):
        assert "replay" in must_manage(project, database, *arguments)
    done = manage(project, database, "aibind", "--database=unknown", "show", "known")
    assert done.returncode == 2
    assert "'unknown' doesn't exist" in done.stderr
    code = "from django.core.management import call_command; call_command('aibind', 'show', 'known')"
    assert "done" in must_manage(project, database, "shell", "-c", code)


def test_stores_are_closed_at_the_exit_of_a_command(project: Path, database: str) -> None:
    code = "from chat.views import store, conversations; store.create('one'); conversations.load('s'); print(store)"
    output = must_manage(project, database, "shell", "-c", code, PGAPPNAME="command")
    assert "<DjangoPoolClient of database 'default'>, open>" in output
    with PostgresStreamStore(database) as store:
        assert store.get_status("one").state == "active"
    # A pool that is not closed warns at the exit, and PYTHONWARNINGS makes this an error.
    assert manage(project, database, "shell", "-c", code.replace("one", "two")).stderr == ""


def test_password_and_role_of_the_settings(tmp_path: Path, server: str, database: str) -> None:
    role = f"a role {uuid.uuid4().hex}"
    query(database, f'CREATE ROLE "{role}" SUPERUSER')
    try:
        settings = f'DATABASES["default"]["OPTIONS"]["assume_role"] = {role!r}'
        project = django_project.write(tmp_path / "project", settings)
        code = "from chat.views import store; print(store._database.query('SELECT current_user', [])[0][0])"
        assert must_manage(project, database, "shell", "-c", code).endswith(f"{role}\n")
    finally:
        query(database, f'DROP ROLE "{role}"')


def test_end_of_a_server_for_asgi(project: Path, database: str) -> None:
    must_manage(project, database, "migrate")
    command = "uvicorn --port={port} --timeout-graceful-shutdown=1 mysite.asgi:application"
    with django_project.served(project, database, command) as address:
        body = json.dumps({"prompt": "Wait"}).encode()
        request = Request(f"{address}/async/stream", body, {"Content-Type": "application/json"})
        response = urlopen(request, timeout=30)
        while b"Wait: " not in response.readline():
            pass
    response.close()
    with PostgresStreamStore(database) as store:
        assert [(info.state, info.error) for info in store.list()] == [("error", INTERRUPTED)]


def test_conversation_of_the_store(project: Path, database: str) -> None:
    code = (
        "from chat.views import conversations\n"
        "with conversations.edit('s') as chat: chat.append({'role': 'user', 'content': 'Hi'})"
    )
    must_manage(project, database, "shell", "-c", code)
    with PostgresConversationStore(make_conninfo(database)) as store:
        assert store.load("s").messages == [{"role": "user", "content": "Hi"}]
