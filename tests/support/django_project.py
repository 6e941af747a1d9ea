"""A project of Django with the app, its command line, and its server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

if TYPE_CHECKING:
    from playwright.sync_api import Page

TEMPLATE = Path(__file__).parent / "django_template"


def write(folder: Path, settings: str = "") -> Path:
    """Write the project into a new folder, with more settings."""
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if settings:
        with (folder / "mysite" / "settings.py").open("a", encoding="utf-8") as file:
            file.write(f"\n{settings}\n")
    return folder


def environment(dsn: str, **others: str) -> dict[str, str]:
    found = {**os.environ, "SERVER": dsn, "PYTHONWARNINGS": "error", **others}
    found.pop("DATABASE_URL", None)
    return found


def manage(folder: Path, dsn: str, *arguments: str, **others: str) -> subprocess.CompletedProcess[str]:
    """Run `manage.py`."""
    command = [sys.executable, "manage.py", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(dsn, **others),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def must_manage(folder: Path, dsn: str, *arguments: str, **others: str) -> str:
    """Run `manage.py`, which must succeed, and return its output."""
    done = manage(folder, dsn, *arguments, **others)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def served(folder: Path, dsn: str, command: str = "uvicorn --port={port} mysite.asgi:application") -> Iterator[str]:
    """Serve the project, and yield its address."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(folder), *sys.path])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.format(port=port).split()],
            cwd=folder,
            env=environment(dsn, PYTHONPATH=path, PYTHONWARNINGS="ignore"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urlopen(f"{address}/admin/login/", timeout=30):
                return
        except (URLError, ConnectionError):
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server accepts no connection"
            time.sleep(0.05)


def create_admin(folder: Path, dsn: str) -> None:
    """Create the user "admin", whose password is "admin"."""
    arguments = ("createsuperuser", "--noinput", "--username=admin", "--email=admin@example.com")
    must_manage(folder, dsn, *arguments, DJANGO_SUPERUSER_PASSWORD="admin")


def log_in(page: Page, address: str) -> None:
    """Log in as this user."""
    page.goto(f"{address}/admin/login/")
    page.fill("#id_username", "admin")
    page.fill("#id_password", "admin")
    page.click("input[type=submit]")
    page.wait_for_url(f"{address}/admin/**")
