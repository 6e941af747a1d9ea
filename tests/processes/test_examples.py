"""The replay script of the examples, run from the command line."""

from __future__ import annotations

import subprocess
import sys
import time

import psycopg
from support.applications import EXAMPLES, environment_of

from aibind_postgres import PostgresStreamStore


def run(database: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "replay_stream.py"), *arguments]
    environment = environment_of(database)
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_replay_stream(database: str) -> None:
    with PostgresStreamStore(database) as store:
        store.create("story")
        for chunk in ("Once ", "\x01upon ", "usage\x01{}", "a time ✦\n"):
            store.append("story", chunk)
            time.sleep(0.4)
        store.complete("story")
    began = time.monotonic()
    replay = run(database, "story")
    assert time.monotonic() - began > 0.8
    assert (replay.stdout, replay.returncode) == ("Once upon a time ✦\n", 0)


def test_replay_stream_without_pauses(database: str) -> None:
    with PostgresStreamStore(database) as store, psycopg.connect(database, autocommit=True) as connection:
        store.create("story")
        store.append("story", "Once ")
        connection.execute("UPDATE aibind_stream_chunks SET created_at = created_at - interval '1 hour'")
        store.append("story", "upon a time ✦\n")
        store.complete("story")
    replay = run(database, "story", "--speed=inf")  # with pauses it would exceed its timeout
    assert (replay.stdout, replay.returncode) == ("Once upon a time ✦\n", 0)


def test_replay_stream_errors(database: str) -> None:
    missing = run(database, "nobody")
    assert missing.returncode == 1
    assert missing.stderr == ("stream 'nobody' not found: it was never created, was deleted, or has expired\n")
    for wrong in ("--speed=0", "--speed=fast", "--speaker=ann"):
        assert run(database, "story", wrong).returncode != 0


def test_times_of_a_stream(database: str) -> None:
    with PostgresStreamStore(database) as store:
        store.create("story")
        store.append_many("story", ["\x01Once ", 'usage\x01{"outputTokens": 1}'])
        times = [str(chunk.created_at) for chunk in store.read_with_times("story")]
    listed = run(database, "story", "--times")
    assert listed.returncode == 0
    lines = [f"{times[0]} message 'Once '", f"{times[1]} usage '{{\"outputTokens\": 1}}'"]
    assert listed.stdout.splitlines() == lines


def test_lists_of_streams(database: str) -> None:
    with PostgresStreamStore(database) as store:
        store.create("z", owner="ann", session_id="chat")
        store.create("b", owner="ann", session_id="another chat")
        store.create("a", owner="bob", session_id="chat")
        store.append("a", "Once ")
        store.complete("a")

    def ids(*arguments: str) -> list[str]:
        listed = run(database, *arguments)
        assert listed.returncode == 0, listed.stderr
        return [line.split("  ")[1] for line in listed.stdout.splitlines()]

    assert ids() == ["z", "b", "a"]
    assert ids("--owner=ann") == ["z", "b"]
    assert ids("--session=chat") == ["z", "a"]
    assert ids("--session=chat", "--owner=bob") == ["a"]
    assert run(database, "--owner=bob").stdout.rstrip().endswith("a  done  1  bob  chat")
