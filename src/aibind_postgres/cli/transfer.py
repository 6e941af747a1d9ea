"""The commands `export` and `import`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .export_files import STANDARD_OUTPUT, ExportFile, new_file
from .export_format import Counts
from .exporting import Selection, StreamTables, export_streams
from .importing import import_file
from .options import (
    ALL_TABLES,
    Json,
    examples,
    with_target,
)
from .standard_streams import print_message
from .target import Target, open_connection

app = typer.Typer()

All = Annotated[bool, typer.Option("--all", help="Export everything, instead of one ID.")]
Owner = Annotated[
    str | None,
    typer.Option("--owner", metavar="O", help="Export only what belongs to this owner, instead of one ID."),
]
CountsAsJson = Annotated[
    bool, typer.Option("--json", help="Print the numbers of exported records as JSON. FILE must not be -.")
]
IdAndFile = Annotated[
    list[str],
    typer.Argument(
        metavar="[ID] FILE",
        help="ID: what to export, unless --all or --owner is given. FILE: the file to write, compressed if its name "
        "ends with .gz, or - for standard output.",
        show_default=False,
    ),
]


@app.command(
    epilog=examples(
        "export 019ad3a0-5c51-7000-8000-0123456789ab answer.jsonl",
        "export --all streams.jsonl.gz",
        "export --owner ann ann.jsonl --json",
        "export --all - | jq 'select(.type == \"stream\") | .id'",
    )
)
@with_target(*ALL_TABLES)
def export(
    target: Target, arguments: IdAndFile, everything: All = False, owner: Owner = None, as_json: CountsAsJson = False
) -> None:
    """Export streams to a file of JSON lines, from one snapshot.

    The file is named FILE.partial until it is complete. --owner also exports streams without an owner, if they belong
    to conversations of this owner.
    """
    selection, file = parse_selection(arguments, everything, owner, as_json)
    with open_connection(target) as connection:
        tables = StreamTables.of(target)
        with new_file(file) as output:
            counts = export_streams(connection, tables, selection, output.write, shows_progress=file != STANDARD_OUTPUT)
        report_export(counts, f"{counts.streams} streams with {counts.chunks} chunks", file, as_json)


@app.command(
    "import", epilog=examples("import streams.jsonl.gz", "import streams.jsonl.gz --resume", "import ann.jsonl --json")
)
@with_target(*ALL_TABLES)
def import_(
    target: Target,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A file that `export` or `conversations export` has written.", show_default=False
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted import: skip what it has already written."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Import a file of `export` or `conversations export`.

    Ids, sequence numbers and times stay the same. The whole file is checked first: nothing is written if a line is
    malformed or an id exists. Each stream appears in one transaction. A stream that was active when it was exported
    ends in state error, since it has no producer.
    """
    with open_connection(target) as connection, ExportFile(file) as source:
        tables = StreamTables.of(target)
        has_begun = False

        def begin() -> None:
            nonlocal has_begun
            has_begun = True

        try:
            result = import_file(connection, tables, source, resume=resume, on_write=begin)
        except BaseException:
            if has_begun:
                print_message("the import was interrupted: repeat the command with --resume")
            raise
        if as_json:
            print(json.dumps(result._asdict()))
        else:
            skipped = f"; {result.skipped} existed already" if resume else ""
            print_message(
                f"{result.streams} streams with {result.chunks} chunks and {result.conversations} conversations "
                f"imported{skipped}"
            )


def parse_selection(arguments: list[str], everything: bool, owner: str | None, as_json: bool) -> tuple[Selection, str]:
    """Return the selection and the file.

    Raises:
        typer.BadParameter: There is not exactly one of ID, --all and --owner, or --json would be mixed with the export.
    """
    *ids, file = arguments
    if len(ids) + everything + (owner is not None) != 1:
        raise typer.BadParameter("give FILE and exactly one of ID, --all and --owner")
    if owner == "":  # as of an unset variable
        raise typer.BadParameter("--owner must not be empty")
    if as_json and file == STANDARD_OUTPUT:
        raise typer.BadParameter("--json needs the name of a file, since standard output receives the export")
    return Selection(ids[0] if ids else None, owner), file


def report_export(counts: Counts, text: str, file: str, as_json: bool) -> None:
    """Print the numbers of exported records as JSON, or in a message unless the file is standard output."""
    if as_json:
        print(json.dumps(counts._asdict()))
    elif file != STANDARD_OUTPUT:
        print_message(f"{text} exported to {file}")
