"""The package in a zip file, as in a program that was packed into one file."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import psycopg
import pytest

import aibind_postgres
from aibind_postgres import schema

PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import aibind_postgres
assert aibind_postgres.__file__.startswith(sys.path[0])
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip file with the package and its SQL files."""
    source, file = Path(aibind_postgres.__file__).parent, tmp_path_factory.mktemp("zip") / "package.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for module in source.rglob("*.py"):
            archive.write(module, Path(source.name, module.relative_to(source)))
        archive.write(source / "cli" / "demo.txt", Path(source.name, "cli", "demo.txt"))
        for sql in Path(str(schema.SQL_FOLDER)).rglob("*.sql"):
            archive.write(sql, Path(source.name, "sql", sql.relative_to(str(schema.SQL_FOLDER))))
    return file


def run(package: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM + program, str(package), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_migrate_from_a_zip_file(package: Path, empty_database: str) -> None:
    done = run(
        package,
        "from aibind_postgres import schema; schema.migrate(sys.argv[1], notify_trigger=True)",
        empty_database,
    )
    assert done.returncode == 0, done.stderr
    with psycopg.connect(empty_database) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert len(tables) == 4


def test_demos_from_a_zip_file(package: Path, database: str) -> None:
    cli = "from aibind_postgres.cli import main; main()"
    assert "The readers received the whole text" in run(package, cli, "demo", f"--dsn={database}").stdout
    web = run(package, cli, "demo", "--web", "--port=0", f"--dsn={database}")
    assert (web.returncode, "not in a zip file" in web.stderr) == (1, True), web.stderr
