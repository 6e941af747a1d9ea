"""Help texts, colours, shell completion, and standard streams that are closed or full, of the command in processes."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from support.command_line import COMMAND, environment, in_parallel, run
from support.terminal import run_on_terminal
from typer.main import get_command

from aibind_postgres import PostgresStreamStore
from aibind_postgres.cli.app import app

COMMANDS: dict[str, object] = get_command(app).commands  # type: ignore[attr-defined]  # of a group
SHELL_COMMAND = shlex.join(COMMAND)


@pytest.fixture
def store(database: str) -> Iterator[PostgresStreamStore]:
    with PostgresStreamStore(database) as store:
        yield store


def shell(script: str, dsn: str) -> subprocess.CompletedProcess[bytes]:
    script = script.replace("aibind-postgres", SHELL_COMMAND)
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=environment(dsn), timeout=60)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"AttributeError" not in done.stderr, done.stderr.decode()
    assert b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


# Help and colours


def test_help_has_examples_and_no_colour() -> None:
    commands = [[], *([name] for name in COMMANDS)]
    for command, done in zip(
        commands, in_parallel([*command, "--help"] for command in commands)(FORCE_COLOR="1"), strict=True
    ):
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\x1b" not in done.stdout
        if command:
            assert f"\n    aibind-postgres {command[0]}".encode() in done.stdout, command
        else:
            assert b"Exit codes:\n      0  done\n" in done.stdout


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"])
def test_usage_errors_in_a_pipe_have_no_colour(variable: str) -> None:
    for done in in_parallel([["unknown"], ["tail"], ["tail", "x", "--after", "no"]])(**{variable: "1"}):
        assert done.returncode == 2
        assert b"Error: " in done.stderr
        assert b"\x1b" not in done.stderr + done.stdout


def test_json_in_a_pipe_is_utf_8(database: str, store: PostgresStreamStore) -> None:
    store.create("é 🙂")
    done = run("list", "--json", dsn=database, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["id"] == "é 🙂"


def test_no_color_on_a_terminal(database: str) -> None:
    for command in (
        ["--help"],
        ["demo", "--help"],
        ["unknown"],
        ["tail", "x"],
        ["doctor"],
        ["demo", "--dsn", database],
    ):
        _, output = run_on_terminal(*command, dsn=database, NO_COLOR="1")
        assert output
        assert "\x1b" not in output, command


def test_demo_in_a_pipe_has_no_colour(database: str) -> None:
    done = run("demo", "--dsn", database, FORCE_COLOR="1")
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout + done.stderr


# Shell completion


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_script(name: str) -> None:
    done = run(_AIBIND_POSTGRES_COMPLETE=f"source_{name}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"_AIBIND_POSTGRES_COMPLETE=complete_" in done.stdout
    assert b"aibind-postgres" in done.stdout


def test_completion_of_a_command() -> None:
    words = {"COMP_WORDS": "aibind-postgres fail", "COMP_CWORD": "1"}
    done = run(_AIBIND_POSTGRES_COMPLETE="complete_bash", **words)
    assert done.stdout.decode().split() == ["fail", "fail-abandoned"]


# Closed and full standard streams


def test_closed_standard_output(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append("x", "text")
    store.complete("x")
    for command in ("tail x", "replay x --instant", "list", "show x", "schema", "--help", "doctor"):
        done = shell(f"aibind-postgres {command} >&-", database)
        assert (done.returncode, command) == (1 if command != "doctor" else 2, command)
        assert done.stderr == b"aibind-postgres: standard output cannot be written: Bad file descriptor\n"
    assert shell("echo text | aibind-postgres write y >&-", database).returncode == 0
    assert store.get_status("y") == ("done", None, 1)


def test_full_disk(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append("x", "text")
    store.complete("x")
    for command in ("tail x", "replay x --instant", "list", "list --json", "show x", "schema", "--help", "--version"):
        done = shell(f"aibind-postgres {command} >/dev/full", database)
        assert (done.returncode, command) == (1, command)
        assert done.stderr == b"aibind-postgres: standard output cannot be written: No space left on device\n"


def test_closed_standard_input(database: str, store: PostgresStreamStore) -> None:
    done = shell("aibind-postgres write x <&-", database)
    assert done.returncode == 1
    assert done.stderr == b"aibind-postgres: standard input cannot be read: Bad file descriptor\n"
    assert store.get_status("x") is None
    assert shell("aibind-postgres delete x <&-", database).returncode == 2
    assert shell("aibind-postgres list <&-", database).returncode == 0


def test_closed_standard_error(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append("x", "text")
    store.stop("x")
    for command, code in (
        ("tail x 2>&-", 1),
        ("tail x 2>/dev/full", 1),
        ("show missing 2>&-", 3),
        ("show missing 2>/dev/full", 3),
        ("unknown 2>&-", 2),
    ):
        done = shell(f"aibind-postgres {command}", database)
        assert (done.returncode, command) == (code, command)
        assert done.stdout == (b"text" if "tail" in command else b"")
    assert shell("aibind-postgres tail x <&- >&- 2>&-", database).returncode == 1
    assert shell("echo text | aibind-postgres write y 2>&-", database).returncode == 0
    assert store.get_status("y") == ("done", None, 1)
