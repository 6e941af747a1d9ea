"""Streams and conversations with all kinds of values, and the command that exports and imports them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore

from .command_line import COMMAND, environment

HOSTILE = [
    "\u2028\u2029\u0085",
    "\x01\x1b[31m\x7f",
    "\\",
    "\\.",
    "\\N",
    "\n",
    "\r\n\t\v",
    "\"'`$1 $$ %s %(id)s {x}",
    "é 🙂 \ufeff \U0010ffff",
    "'; DROP TABLE aibind_stream_chunks; --",
    '{"type":"end"}',
]
# Numbers that Python rounds, and keys that PostgreSQL puts in order.
METADATA = (
    '{"price": 1.10, "large": 123456789012345678901234567890, "precise": 0.1000000000000000055511151231257827, '
    '"a": "\\u2028\\\\"}'
)


def run(*arguments: str | Path, dsn: str | None, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, and check its exit code."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(dsn),
        timeout=90,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode == code, done.stderr.decode()
    return done


def start(*arguments: str | Path, dsn: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=pipe, stderr=pipe, env=environment(dsn))


# `getrusage` would include the memory that the process had before it executed the program: that of the tests.
MEASURED = """
import atexit, re, sys
from pathlib import Path
from aibind_postgres.cli import main
atexit.register(lambda: print(re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]))
main()
"""


def peak_memory(*arguments: str | Path, dsn: str) -> int:
    """Run a command that prints nothing, and return the largest size of its memory in kB. Needs Linux."""
    command = [sys.executable, "-W", "error", "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment(dsn), timeout=90, check=True)
    return int(done.stdout)


def export(dsn: str, *arguments: str) -> bytes:
    """Return the bytes of an export to standard output."""
    return run("export", *(arguments or ["--all"]), "-", dsn=dsn).stdout


def create_samples(dsn: str) -> None:
    """Create streams in all states, with hostile ids, texts and values, and conversations."""
    with PostgresStreamStore(dsn, ttl=86_400 * 365) as store, PostgresConversationStore(dsn, ttl=None) as conversations:
        for number, text in enumerate(HOSTILE):
            store.create(f"{number} {text}", owner=f"ann {text}", session_id=f"chat {text}", wire="ai_sdk", ttl=10**8)
            store.append_many(f"{number} {text}", HOSTILE)
        for state in ("done", "stopped", "error"):
            store.create(state, metadata={"state": state})
            store.append_many(state, ["", state])
        store.complete("done")
        store.stop("stopped")
        store.fail("error", "".join(HOSTILE))
        store.create("without chunks")
        for number, text in enumerate(HOSTILE):
            store.complete(f"{number} {text}")
        store.complete("without chunks")
        for text in HOSTILE:
            chat: ChatHistory[str] = ChatHistory()
            chat.edit(chat.append(text), text)
            conversations.save(f"chat {text}", chat, owner=f"ann {text}")
            conversations.describe(f"chat {text}", title=text, metadata={"text": text})
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("UPDATE aibind_stream_status SET metadata = %s WHERE id LIKE '1%%'", [METADATA])
        admin.execute(
            "UPDATE aibind_conversations SET metadata = %s, created_at = NULL, updated_at = '-infinity'", [METADATA]
        )
        admin.execute("UPDATE aibind_stream_status SET created_at = 'infinity', metadata = 'null' WHERE id = 'done'")
        admin.execute("UPDATE aibind_stream_status SET created_at = '0044-03-15 BC' WHERE id = 'stopped'")
        admin.execute("UPDATE aibind_stream_status SET created_at = NULL WHERE id = 'error'")
        admin.execute("UPDATE aibind_stream_chunks SET created_at = NULL WHERE seq = 2")
        admin.execute("UPDATE aibind_stream_chunks SET created_at = '2026-11-30 12:00:00.120000Z' WHERE seq = 3")
        admin.execute("UPDATE aibind_stream_chunks SET created_at = '2026-11-30 12:00Z' WHERE seq = 4")


def create_long_stream(dsn: str, chunks: int) -> None:
    """Create a finished stream with chunks of 20 characters."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at) VALUES ('long', 'done', %s, 9e12)",
            [chunks],
        )
        admin.execute(
            "INSERT INTO aibind_stream_chunks (id, seq, data) "
            "SELECT 'long', n, lpad(n::text, 20) FROM generate_series(1, %s) AS n",
            [chunks],
        )
