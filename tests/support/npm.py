"""The published npm packages with which tests run the clients of other projects, and programs in Node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PROJECTS = Path(__file__).parent.parent / "npm"
INSTALL_TIMEOUT = 300  # seconds


@cache
def install(name: str) -> Path:
    """Install the packages of a folder of `tests/npm` once for this user, and return a copy of the folder with them.

    The folder has a `package.json` and a lock file. Skip the test without Node, or if the packages cannot be installed.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs Node.js and npm")
    project = PROJECTS / name
    digest = hashlib.sha256((project / "package-lock.json").read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"aibind-postgres-npm-{os.getuid()}", f"{name}-{digest}")
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        for file in ("package.json", "package-lock.json"):
            shutil.copy(project / file, scratch)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--engine-strict=false"]
        done = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False
        )
        if done.returncode:
            shutil.rmtree(scratch)
            pytest.skip(f"npm cannot install {name}: {done.stderr.strip()[-500:]}")
        try:
            scratch.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return target


def version(name: str, package: str) -> str:
    """Return the installed version of a package."""
    manifest: dict[str, Any] = json.loads((install(name) / "node_modules" / package / "package.json").read_text())
    return str(manifest["version"])


def run_node(name: str, script: Path, input: str = "", *arguments: str, timeout: float = 120) -> str:
    """Run a script, an ES module, with the packages of a folder. Return its output. Raise if it fails."""
    # Node searches packages next to the script.
    copy = install(name) / f"{script.stem}-{os.getpid()}.mjs"
    shutil.copy(script, copy)
    try:
        done = subprocess.run(
            ["node", str(copy), *arguments], input=input, capture_output=True, text=True, timeout=timeout, check=False
        )
    finally:
        copy.unlink()
    assert done.returncode == 0, done.stderr
    return done.stdout
