"""The example scripts, run from the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from aibind_postgres import PostgresStreamStore

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_replay_stream(database: str) -> None:
    with PostgresStreamStore(database) as store:
        store.create("story")
        for chunk in ("Once ", "upon ", "a time ✦\n"):
            store.append("story", chunk)
            time.sleep(0.4)
        store.complete("story")
    began = time.monotonic()
    slow = run("replay_stream.py", database, "story")
    slow_took = time.monotonic() - began
    fast = run("replay_stream.py", database, "story", "inf")
    fast_took = time.monotonic() - began - slow_took
    assert (slow.stdout, slow.returncode) == ("Once upon a time ✦\n", 0)
    assert (fast.stdout, fast.returncode) == ("Once upon a time ✦\n", 0)
    assert slow_took > 0.8
    assert slow_took - fast_took > 0.5


def test_replay_stream_errors(database: str) -> None:
    missing = run("replay_stream.py", database, "nobody")
    assert missing.returncode == 1
    assert missing.stderr == ("stream 'nobody' not found: it was never created, was deleted, or has expired\n")
    usage = run("replay_stream.py")
    assert usage.returncode == 1
    assert "Usage:" in usage.stderr


def test_replay_stream_is_short() -> None:
    assert len((EXAMPLES / "replay_stream.py").read_text("utf-8").splitlines()) < 30
