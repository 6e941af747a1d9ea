"""The migration and the filter of docs/alembic.md, run by Alembic on psycopg and asyncpg."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import URL

DOCS = Path(__file__).parents[2] / "docs"
TABLES = ["aibind_conversations", "aibind_stream_chunks", "aibind_stream_chunks_archive", "aibind_stream_status"]
ENV = """
import asyncio

from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table, make_url
from sqlalchemy.ext.asyncio import create_async_engine

{include_name}

URL = make_url({url!r})
target_metadata = MetaData()
Table("own", target_metadata, Column("id", Integer, primary_key=True))


def run(connection):
    {configure}
    with context.begin_transaction():
        context.run_migrations()


async def main():
    engine = create_async_engine(URL)
    async with engine.connect() as connection:
        await connection.run_sync(run)
        await connection.commit()
    await engine.dispose()


if context.is_offline_mode():
    context.configure(url=URL, target_metadata=target_metadata, dialect_opts={{"paramstyle": "named"}})
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(main())
"""
OWN = """
from alembic import op

revision = "own"
down_revision = "aibind_tables"


def upgrade():
    op.execute("CREATE TABLE own (id SERIAL PRIMARY KEY)")


def downgrade():
    op.execute("DROP TABLE own")
"""


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "alembic.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def url_of(dsn: str, driver: str) -> str:
    found = conninfo_to_dict(dsn)
    query = {"host": str(found["host"]), "port": str(found.get("port", 5432))}
    url = URL.create(f"postgresql+{driver}", found["user"], found.get("password"), database=found["dbname"])
    return url.update_query_dict(query).render_as_string(hide_password=False)


def write_project(folder: Path, url: str, *, filtered: bool) -> None:
    migration, include_name, configure = blocks()
    if not filtered:
        configure = configure.replace(", include_name=include_name", "")
    configure = configure.strip().partition("\n")[2]
    (folder / "migrations" / "versions").mkdir(parents=True, exist_ok=True)
    (folder / "migrations" / "versions" / "aibind_tables.py").write_text(migration, "utf-8")
    (folder / "migrations" / "versions" / "own.py").write_text(OWN, "utf-8")
    (folder / "migrations" / "env.py").write_text(
        ENV.format(include_name=include_name, configure=configure, url=url), "utf-8"
    )
    (folder / "alembic.ini").write_text("[alembic]\nscript_location = migrations\n", "utf-8")


def alembic(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alembic", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, check=False)


def tables(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1").fetchall()
    return [name for (name,) in rows]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_alembic(driver: str, empty_database: str, tmp_path: Path) -> None:
    url = url_of(empty_database, driver)
    write_project(tmp_path, url, filtered=True)
    done = alembic(tmp_path, "upgrade", "head")
    assert done.returncode == 0, done.stderr
    assert tables(empty_database) == sorted([*TABLES, "alembic_version", "own"])
    done = alembic(tmp_path, "check")
    assert done.returncode == 0, done.stdout + done.stderr

    write_project(tmp_path, url, filtered=False)  # the filter is necessary
    assert "aibind_stream_chunks" in (done := alembic(tmp_path, "check")).stdout + done.stderr
    assert done.returncode != 0

    done = alembic(tmp_path, "downgrade", "base")
    assert done.returncode == 0, done.stderr
    assert tables(empty_database) == ["alembic_version"]


def test_sql_of_the_offline_mode_runs(empty_database: str, tmp_path: Path) -> None:
    write_project(tmp_path, url_of(empty_database, "psycopg"), filtered=True)
    done = alembic(tmp_path, "upgrade", "head", "--sql")
    assert done.returncode == 0, done.stderr
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(done.stdout.encode())
    assert tables(empty_database) == sorted([*TABLES, "alembic_version", "own"])
