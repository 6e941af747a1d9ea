"""`aibind-postgres demo` in the terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib import resources

import psycopg

import aibind_postgres.cli
from aibind_postgres import PostgresStreamStore

COMMAND = [sys.executable, "-W", "error", "-m", "aibind_postgres.cli", "demo"]
TEXT = resources.files(aibind_postgres.cli).joinpath("demo.txt").read_text("utf-8")


def check(output: str) -> None:
    first, second = output.split("The first reader was killed")
    last = int(re.findall(r"resumes after chunk (\d+)", second)[0])
    total = int(re.findall(r"written +│ +1 … (\d+)", second)[0])
    assert 0 < last < total
    assert "The readers received the whole text" in second
    shown = first.partition("\n\n")[2][:-2] + second.partition(":\n\n")[2].partition("\nSummary")[0]
    assert shown.strip() == TEXT.strip()


def test_embedded_server_leaves_no_files() -> None:
    with tempfile.TemporaryDirectory(prefix="aibind-test-") as folder:
        ignored = {"DATABASE_URL": "ignored by the demo", "PGHOSTADDR": "127.0.0.1", "PGOPTIONS": "-c search_path=x"}
        environment = {**os.environ, **ignored, "HOME": folder, "TMPDIR": folder}
        done = subprocess.run(COMMAND, capture_output=True, encoding="utf-8", env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert os.listdir(folder) == []
    check(done.stdout)
    assert "temporary folder" in done.stderr


def test_missing_tables_message_names_migrate(empty_database: str) -> None:
    done = subprocess.run([*COMMAND, "--dsn", empty_database], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1
    assert "aibind-postgres migrate" in done.stderr
    assert "Traceback" not in done.stderr


def test_garbled_chunks_fail_the_demo_and_its_stream_is_deleted(database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(
            """CREATE FUNCTION garble() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN
                 IF NEW.seq = 50 THEN RAISE 'this is enough'; END IF;
                 NEW.data := 'garbled ';
                 RETURN NEW;
               END $$"""
        )
        connection.execute(
            "CREATE TRIGGER garble BEFORE INSERT ON aibind_stream_chunks FOR EACH ROW EXECUTE FUNCTION garble()"
        )
    done = subprocess.run([*COMMAND, "--dsn", database], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 1
    assert "The readers did NOT receive the text that was written" in done.stdout
    assert "this is enough" in done.stdout
    with PostgresStreamStore(database) as store:
        assert list(store.list()) == []
