"""The command line without a database: rows and fields of streams, durations, and the page about its commands."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from aibind_postgres import StreamInfo
from aibind_postgres.cli import text_output
from aibind_postgres.cli.app import EXIT_CODES, app
from aibind_postgres.cli.options import _parse_duration, _parse_period

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
INFO = StreamInfo("a", "done", None, 3, NOW, NOW - timedelta(minutes=5))
PAGE = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text("utf-8")

# Options that the page describes once for all commands.
COMMON = {"--dsn", "--embedded", "--chunks-table", "--status-table", "--conversations-table", "--help"}
MAINTENANCE = {"--json"}  # described once for all commands of the section "Maintenance"


def commands() -> dict[str, Any]:
    """Return all commands by their names, those of groups with the name of the group."""
    found: dict[str, Any] = {}
    pending = [((), get_command(app))]
    while pending:
        names, command = pending.pop()
        if children := getattr(command, "commands", None):
            pending += [((*names, name), child) for name, child in children.items()]
        else:
            found[" ".join(names)] = command
    return found


COMMANDS = commands()


@pytest.mark.parametrize(
    ("passed", "text"),
    [
        (timedelta(seconds=-3), "0s"),
        (timedelta(0), "0s"),
        (timedelta(seconds=59.9), "59s"),
        (timedelta(seconds=60), "1m"),
        (timedelta(minutes=59, seconds=59), "59m"),
        (timedelta(hours=1), "1h"),
        (timedelta(hours=23, minutes=59), "23h"),
        (timedelta(days=400), "400d"),
    ],
)
def test_age(passed: timedelta, text: str) -> None:
    assert text_output.age(NOW - passed, NOW) == text


def test_unknown_age() -> None:
    assert text_output.age(None, NOW) == "-"


def test_row_escapes_control_characters() -> None:
    info = INFO._replace(id="a\nb\x1b[31m", owner="\u202eö\x9b", session_id="\u2028")
    assert text_output.stream_row(info, NOW) == ["a\\nb\\x1b[31m", "done", "3", "5m", "\\u2028", "\u202eö\\x9b"]
    assert text_output.stream_row(INFO, NOW)[4:] == ["-", "-"]


def test_columns_grow_from_page_to_page() -> None:
    widths = [0, 0]
    assert text_output.align([["a", "b"], ["ccc", "d"]], widths) == "a    b\nccc  d\n"
    assert text_output.align([["e", "f"]], widths) == "e    f\n"
    assert widths == [3, 1]


def test_long_list_is_printed_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[list[str]]:
        for cells in (["a", "1"], ["bbb", "2"], ["cccc", "3"], ["d", "4"], ["e", "5"]):
            read.append(cells[0])
            yield cells

    read: list[str] = []
    monkeypatch.setattr(text_output, "PAGE_ROWS", 2)
    printed = text_output.aligned_pages(["ID", "N"], rows())
    assert next(printed) == "ID   N\na    1\nbbb  2\n"
    assert read == ["a", "bbb"]
    assert list(printed) == ["cccc  3\nd     4\n", "e     5\n"]
    assert list(text_output.aligned_pages(["ID", "N"], [])) == ["ID  N\n"]


def test_description_has_every_field() -> None:
    info = INFO._replace(metadata={"ü": None}, ttl=timedelta(minutes=1), error="line\nline", owner="")
    lines = dict(line.split(":", 1) for line in text_output.describe_stream(info, NOW).splitlines())
    assert list(lines) == [name.replace("_", " ") for name in info._fields]
    assert lines["metadata"].strip() == '{"ü": null}'
    assert lines["ttl"].strip() == "60.0 seconds"
    assert lines["error"].strip() == "line\\nline"
    assert lines["session id"].strip() == "-"
    assert lines["created at"].strip() == "2026-01-02T02:59:05+00:00 (5m ago)"
    late, early = (
        text_output.describe_stream(INFO._replace(lease_until=NOW + timedelta(seconds=rest)), NOW) for rest in (-3, 3)
    )
    assert "2026-01-02T03:04:02+00:00 (expired 3s ago)" in late
    assert "expired" not in early


def test_durations() -> None:
    values = {"90s": 90, "10m": 600, "2h": 7200, "7d": 604_800, "0.5s": 0.5, "0s": 0}
    assert {text: _parse_duration(text) for text in values} == values
    for text in ("", "10", "m", "-1m", "1w", "1 m", "1m\n", "infs", "nans", "1e3s", "²s"):
        with pytest.raises(typer.BadParameter):
            _parse_duration(text)
    with pytest.raises(typer.BadParameter):
        _parse_period("0s")


def sections() -> dict[str, str]:
    """Return the section of each command on the page."""
    parts = re.split(r"^### `(.*)`\n", PAGE, flags=re.MULTILINE)
    return {
        name: re.split(r"^##", text, flags=re.MULTILINE)[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_page_has_every_command_with_an_example() -> None:
    assert sections().keys() == COMMANDS.keys()
    assert [name for name, text in sections().items() if f"\naibind-postgres {name}" not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_page_has_every_option(name: str) -> None:
    section = sections()[name]
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")}
    described = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section))
    own = options - COMMON
    if f"### `{name}`" in PAGE.partition("## Maintenance")[2].partition("## Database")[0]:
        own -= MAINTENANCE
    assert own - described == set()
    assert described - options == set()


def test_page_has_the_exit_codes() -> None:
    table = PAGE.partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE)} == EXIT_CODES


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_valid(name: str) -> None:
    examples = re.findall(r"^ {2}aibind-postgres (.*)$", COMMANDS[name].epilog, re.MULTILINE)
    on_page = re.findall(rf"^aibind-postgres ({name} .*)$", sections()[name], re.MULTILINE)
    for example in [*examples, *on_page]:
        words = re.split(r" [|<&>]", example)[0].replace("'", "").replace("the model is not available", "text").split()
        arguments = words[len(name.split()) :]
        assert words[: len(name.split())] == name.split()
        COMMANDS[name].make_context(name, arguments)  # raises if an option is unknown


# The commands below end before they connect to a database.


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A function that runs a command in this process, and returns its exit code and its messages."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # not a terminal

    def invoke(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            app(arguments, prog_name="aibind-postgres")
        output, messages = capsys.readouterr()
        assert output == ""
        assert isinstance(ended.value.code, int)
        return ended.value.code, messages

    return invoke


@pytest.mark.parametrize(
    "command",
    [
        "replay x --speed 0",
        "replay x --speed nan",
        "replay x --speed 2 --instant",
        "replay x --raw --events",
        "replay x --raw --sse",
        "tail x --raw --events",
        "tail x --after -1",
        "write x --by page",
        "write x --delay -1",
        "schema --chunks-table same --status-table same",
        "unknown",
        "tail",
        "list --state paused",
        "delete",
        "delete x --owner o",
        "cleanup --every 10",
        "cleanup --every 0s",
        "archive --older-than -1d",
        "export x",
        "export --all",
        "export x --all file",
        "export --all --owner o file",
        "export x y file",
        "import",
        "conversations unknown",
        "conversations export x",
    ],
)
def test_wrong_usage(invoke: Callable[..., tuple[int, str]], command: str) -> None:
    code, errors = invoke(*command.split())
    assert code == 2
    assert errors


OPERATORS_COMMANDS = [
    "list",
    "show x",
    "stop x",
    "fail x",
    "delete x --yes",
    "cleanup",
    "fail-abandoned",
    "archive",
    "migrate",
    "doctor",
    "export --all -",
    "import x",
    "conversations list",
    "conversations show x",
    "conversations export --all -",
    "conversations delete x --yes",
    "stats",
]


@pytest.mark.parametrize("command", OPERATORS_COMMANDS)
def test_operators_commands_have_no_default_database(invoke: Callable[..., tuple[int, str]], command: str) -> None:
    code, errors = invoke(*command.split())
    assert (code, errors) == (2, "aibind-postgres: no database: give --dsn or --embedded, or set DATABASE_URL\n")
    code, errors = invoke(*command.split(), "--embedded", "--dsn", "postgresql://localhost")
    assert (code, errors) == (2, "aibind-postgres: give --dsn or --embedded, not both\n")


def test_delete_without_a_terminal_needs_yes(invoke: Callable[..., tuple[int, str]]) -> None:
    for command in ("delete x", "delete --owner ann", "conversations delete x"):
        code, errors = invoke(*command.split(), "--dsn", "postgresql://localhost:1")
        assert (code, "give --yes" in errors) == (2, True)
