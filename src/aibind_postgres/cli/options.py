"""The arguments and options that several commands have, and the parsing of their values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal

import typer

from .._arguments import MAX_SECONDS
from .._partitions import MAX_PARTITIONS
from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE
from .target import Target

Id = Annotated[str, typer.Argument(metavar="ID", help="The stream's id.", show_default=False)]
Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="URL",
        help="Connection string. Default: $DATABASE_URL, or else an embedded PostgreSQL in the user's data folder.",
        show_default=False,
    ),
]
DemoDsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="URL",
        help="Connection string. Default: an embedded PostgreSQL in a temporary folder, or with --web in the user's "
        "data folder. $DATABASE_URL is ignored.",
        show_default=False,
    ),
]
ChunksTable = Annotated[str, typer.Option("--chunks-table", metavar="NAME", help="Table of the chunks.")]
StatusTable = Annotated[str, typer.Option("--status-table", metavar="NAME", help="Table of the stream states.")]
ConversationsTable = Annotated[
    str, typer.Option("--conversations-table", metavar="NAME", help="Table of the conversations.")
]
RequiredDsn = Annotated[
    str | None,
    typer.Option("--dsn", metavar="URL", help="Connection string. Default: $DATABASE_URL.", show_default=False),
]
Embedded = Annotated[bool, typer.Option("--embedded", help="Use an embedded PostgreSQL in the user's data folder.")]
NotifyTrigger = Annotated[
    bool,
    typer.Option(
        "--notify-trigger",
        help="Add a trigger that notifies readers of appends by writers that do not notify, such as the TypeScript "
        "package.",
    ),
]


def _parse_partitions(value: str) -> int | Literal["time"]:
    if value == "time":
        return "time"
    if not value.isdecimal():
        raise typer.BadParameter(f"{value!r} is neither a number nor 'time'")
    return int(value)


Partitions = Annotated[
    Any,
    typer.Option(
        "--partitions",
        metavar="N|time",
        parser=_parse_partitions,
        help=f"Create the tables of streams with N partitions by hash (1 to {MAX_PARTITIONS}), or with 'time' by day. "
        "Default: no partitions. Existing tables are not changed.",
        show_default=False,
    ),
]
Citus = Annotated[
    bool,
    typer.Option("--citus", help="Distribute the tables over the workers of Citus. Run this on its coordinator."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Raw = Annotated[bool, typer.Option("--raw", help="Print the stored chunks unchanged, with the names of events.")]
Events = Annotated[
    bool,
    typer.Option("--events", help="Print each chunk as a line of JSON: seq, event ('message' for text) and data."),
]
Sse = Annotated[
    bool, typer.Option("--sse", help="Print the bytes of the event stream that a browser receives, without heartbeats.")
]
After = Annotated[int, typer.Option("--after", metavar="N", min=0, help="Start after chunk number N.")]


def _parse_duration(value: str) -> float:
    """Return the seconds of a duration such as `90s`, `10m`, `2h` or `7d`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
    if not found:
        raise typer.BadParameter(f"{value!r} is not a duration such as 90s, 10m, 2h or 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2]]


def _parse_period(value: str) -> float:
    if not (seconds := _parse_duration(value)) > 0:
        raise typer.BadParameter("it must be above zero")
    if seconds > MAX_SECONDS:
        raise typer.BadParameter(f"it must be at most {MAX_SECONDS:g} seconds")
    return seconds


OlderThan = Annotated[
    Any,
    typer.Option(
        "--older-than", metavar="TIME", parser=_parse_duration, help="Time since the last chunk: 90s, 10m, 2h or 7d."
    ),
]
Every = Annotated[
    Any,
    typer.Option(
        "--every",
        metavar="TIME",
        parser=_parse_period,
        help="Repeat after this time, such as 10m, until Ctrl-C or SIGTERM. Default: run once.",
        show_default=False,
    ),
]


def examples(*commands: str) -> str:
    """Return the epilog of a help text with these commands, which are given without the name of the program."""
    lines = [f"  aibind-postgres {command}" for command in commands]
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *lines])  # \b keeps click from wrapping


STREAM_TABLES = ("chunks_table", "status_table")
CONVERSATION_TABLES = ("status_table", "conversations_table")
ALL_TABLES = ("chunks_table", "status_table", "conversations_table")

_TABLES: dict[str, tuple[Any, str]] = {
    "chunks_table": (ChunksTable, CHUNKS_TABLE),
    "status_table": (StatusTable, STATUS_TABLE),
    "conversations_table": (ConversationsTable, CONVERSATIONS_TABLE),
}


def with_target(*tables: str, must_choose: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command options for its database and tables, as its argument `target`.

    Args:
        tables: The tables, by the names of the attributes of `Target`.
        must_choose: Whether the command ends if no database is given. Otherwise it uses the embedded server. Default:
            True.
    """
    options: dict[str, tuple[Any, object]] = {"dsn": (RequiredDsn if must_choose else Dsn, None)}
    if must_choose:
        options["embedded"] = Embedded, False
    options |= {name: _TABLES[name] for name in tables}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**values: Any) -> None:
            command(target=Target(**{name: values.pop(name) for name in options}), **values)

        # Typer reads the options from the signature and the annotations.
        own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "target"]
        added = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]  # typeshed does not know it
        run.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
        return run

    return decorate
