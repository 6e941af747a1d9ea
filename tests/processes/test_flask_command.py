"""`flask aibind`, run in separate processes with the application of a project."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from psycopg.conninfo import make_conninfo

from aibind_postgres import PostgresStreamStore

# Without the entry point, such as in an environment that was installed before it: flask finds the command in the app.
APP = """
from flask import Flask
from aibind_postgres.cli.flask_command import command

app = Flask(__name__)
app.config["DATABASE_URL"] = {url!r}
if "aibind" not in app.cli.commands:
    app.cli.add_command(command)
"""


@pytest.fixture
def flask(tmp_path):
    """Run `flask aibind` in a folder with an application."""

    def run(url, *arguments, stdin=b"", variable=None):
        (tmp_path / "app.py").write_text(APP.format(url=url))
        inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        environment = inherited | ({"DATABASE_URL": variable} if variable else {})
        command = [sys.executable, "-W", "error", "-m", "flask", "aibind", *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, cwd=tmp_path, env=environment, timeout=60, check=False
        )

    return run


NOWHERE = "postgresql://127.0.0.1:1/nowhere"


def test_commands_on_the_database_of_the_setting(flask, empty_database):
    assert flask(empty_database, "migrate", variable=NOWHERE).returncode == 0
    text = b"line 1\n--line 2\n"
    assert flask(empty_database, "write", "id", "--by", "word", stdin=text).returncode == 0
    tail = flask(empty_database, "tail", "id", "--after=0")
    assert (tail.returncode, tail.stdout) == (0, text)
    with PostgresStreamStore(empty_database) as store:
        assert store.get_status("id").state == "done"


def test_option_and_variable(flask, database):
    missing = flask(NOWHERE, "show", "id", "--dsn", database)
    assert (missing.returncode, b"not found" in missing.stderr) == (3, True)
    missing = flask(None, "show", "id", variable=database)
    assert (missing.returncode, b"not found" in missing.stderr) == (3, True)
    without = flask(None, "show", "id")
    assert (without.returncode, b"no database" in without.stderr) == (2, True)


def test_help_and_wrong_usage(flask):
    for arguments in ((), ("--help",), ("tail", "--help")):
        shown = flask(NOWHERE, *arguments)
        assert b"Usage: aibind-postgres" in shown.stdout + shown.stderr
    assert flask(NOWHERE, "nonsense").returncode == 2


def test_password_is_not_printed(flask, database):
    shown = flask(make_conninfo(NOWHERE, password="secret"), "show", "id")
    assert shown.returncode == 1
    assert b"secret" not in shown.stdout + shown.stderr


def test_entry_point_of_the_installed_package():
    found = [each for each in entry_points(group="flask.commands") if each.name == "aibind"]
    if not found:
        pytest.skip("the installed package is older than the command")
    assert found[0].load().name == "aibind"
