"""The shortest run of all benchmarks: table, JSON file and plot."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # about 30 seconds, or several times as long on a busy machine

ROOT = Path(__file__).parents[2]


WORKS = [
    "append, one producer, asyncio",
    *(f"append, {count} threads" for count in (2, 8, 32, 100)),
    "append, 500 asyncio tasks",
    "append, 32 stores",
    "append, with migration 0004",
    "leases of",
    "append_many",
    "chats",
    "chunk to a reader in another process, 200/s",
    "chunk to a reader in another process, 30/s",
    "replay",
    "archive, a token of",
    "unarchive",
    "append, with migration 0005",
    "first chunk",
    "memory",
    "with a replica",
    "hot standby",
    "idle readers",
    "readers of one stream",
    "fleet of",
    "frame a chunk",
    "first token of useChat over HTTP",
    "answers over HTTP, 30 tokens/s each",
    "save",
    "chunks stored",
    "drop a day of",
    "import",
]

WITHOUT_PEERS = """
import shutil, sys
which = shutil.which
shutil.which = lambda name, *more: None if name == "redis-server" else which(name, *more)
import typer
from benchmarks.__main__ import main
sys.argv[0] = "benchmarks"
typer.run(main)
"""


def run(*arguments, code=None):
    start = ["-m", "benchmarks"] if code is None else ["-c", code]
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def test_rows_and_files(tmp_path):
    file, picture = tmp_path / "results.json", tmp_path / "results.svg"
    options = ["--smoke", "--json", str(file)]
    if find_spec("matplotlib") is not None:
        options += ["--plot", str(picture)]
    done = run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text("utf-8"))
    works = " ".join(row["work"] for row in results["rows"])
    assert all(work in works for work in WORKS)
    assert all(row["ours"] for row in results["rows"])
    assert picture.exists() == (find_spec("matplotlib") is not None)
    assert "/" not in json.dumps([results["versions"], results["machine"]])  # no paths of this machine


def test_missing_peer():
    done = run("--smoke", "--only", "append-many", code=WITHOUT_PEERS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "redis-server is not installed" in done.stdout


def test_unknown_benchmark():
    done = run("--only", "nothing")
    assert done.returncode == 2
    assert "unknown benchmark: nothing" in done.stderr


def test_partitions():
    command = [sys.executable, "-m", "benchmarks.partitions", "--streams", "200", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest index of chunks" in done.stdout
