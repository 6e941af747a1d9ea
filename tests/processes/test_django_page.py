"""The project of docs/django.md: its settings, URLs, server and tests, in a new project of `django-admin`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.applications import Browser, serving
from support.pages import blocks_of

BLOCKS = [block for block in blocks_of("docs/django.md") if block.language == "python"]
SETTINGS, URLS, ASGI, TABLES, TESTS = BLOCKS
DATABASE = """
import os

from psycopg.conninfo import conninfo_to_dict

server = conninfo_to_dict(os.environ["DATABASE_URL"])
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": server.pop("dbname"), "OPTIONS": server}}
ALLOWED_HOSTS = ["*"]
"""


def manage(project: Path, database: str, *arguments: str) -> str:
    """Run `manage.py`, which must succeed, and return its output."""
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=project,
        env={**os.environ, "DATABASE_URL": database, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "django", "startproject", "mysite", "."], cwd=tmp_path, check=True)
    assert [block.first_line for block in (SETTINGS, URLS, ASGI)] == [
        "# mysite/settings.py",
        "# mysite/urls.py",
        "# mysite/asgi.py",
    ]
    settings = tmp_path / "mysite" / "settings.py"
    added = SETTINGS.code.replace("    ...,", "    *INSTALLED_APPS,")
    settings.write_text(settings.read_text("utf-8") + DATABASE + added, "utf-8")
    (tmp_path / "mysite" / "urls.py").write_text(URLS.code, "utf-8")
    (tmp_path / "mysite" / "asgi.py").write_text(ASGI.code, "utf-8")
    return tmp_path


def test_quick_start_and_tests(project: Path, empty_database: str) -> None:
    manage(project, empty_database, "migrate")
    (project / "chat").mkdir()
    (project / "chat" / "__init__.py").touch()
    (project / "chat" / "tests.py").write_text(TESTS.code, "utf-8")
    assert "Ran 1 test" in manage(project, empty_database, "test", "--noinput")
    with serving(f"uvicorn --app-dir={project} --port={{port}} mysite.asgi:application", empty_database) as url:
        browser = Browser(url)
        assert "You " in browser.open("POST", "/__aibind__/stream", {"prompt": "Hello"}).read().decode()
        assert browser.status("GET", "/__aibind__/conversations") == 401  # nobody is logged in


def test_names_of_tables(project: Path, empty_database: str) -> None:
    with (project / "mysite" / "settings.py").open("a", encoding="utf-8") as settings:
        settings.write(TABLES.code)
    sql = manage(project, empty_database, "sqlmigrate", "aibind_postgres", "0001")
    assert '"chat"."streams"' in sql
