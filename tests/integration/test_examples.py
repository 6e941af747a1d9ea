"""The example scripts, run from the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psycopg

from aibind_postgres import PostgresStreamStore

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_replay_stream(database: str) -> None:
    with PostgresStreamStore(database) as store:
        store.create("story")
        for chunk in ("Once ", "\x01upon ", "usage\x01{}", "a time ✦\n"):
            store.append("story", chunk)
            time.sleep(0.4)
        store.complete("story")
    began = time.monotonic()
    replay = run("replay_stream.py", database, "story")
    assert time.monotonic() - began > 0.8
    assert (replay.stdout, replay.returncode) == ("Once upon a time ✦\n", 0)


def test_replay_stream_without_pauses(database: str) -> None:
    with PostgresStreamStore(database) as store, psycopg.connect(database, autocommit=True) as connection:
        store.create("story")
        store.append("story", "Once ")
        connection.execute("UPDATE aibind_stream_chunks SET created_at = created_at - interval '1 hour'")
        store.append("story", "upon a time ✦\n")
        store.complete("story")
    replay = run("replay_stream.py", database, "story", "inf")  # with pauses it would exceed its timeout
    assert (replay.stdout, replay.returncode) == ("Once upon a time ✦\n", 0)


def test_replay_stream_errors(database: str) -> None:
    missing = run("replay_stream.py", database, "nobody")
    assert missing.returncode == 1
    assert missing.stderr == ("stream 'nobody' not found: it was never created, was deleted, or has expired\n")
    usage = run("replay_stream.py")
    assert usage.returncode == 1
    assert "Usage:" in usage.stderr


def test_replay_stream_is_short() -> None:
    assert len((EXAMPLES / "replay_stream.py").read_text("utf-8").splitlines()) < 30
