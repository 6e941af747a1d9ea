"""A short run of two benchmarks: table, JSON file and plot."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


def test_rows_files_and_missing_peer(tmp_path):
    file, picture = tmp_path / "results.json", tmp_path / "results.svg"
    options = ["--quick", "--only", "append-many", "--only", "import", "--json", str(file)]
    if find_spec("matplotlib") is not None:
        options += ["--plot", str(picture)]
    done = run(*options, code=WITHOUT_PEERS)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text("utf-8"))
    works = [row["work"] for row in results["rows"]]
    assert len(works) == 3
    assert all(work in done.stdout for work in works)
    assert "redis-server is not installed" in done.stdout
    assert picture.exists() == (find_spec("matplotlib") is not None)
    assert "/" not in json.dumps([results["versions"], results["machine"]])  # no paths of this machine


def test_unknown_benchmark():
    done = run("--only", "nothing")
    assert done.returncode == 2
    assert "unknown benchmark: nothing" in done.stderr
