"""`manage.py aibind`: the commands of `aibind-postgres` on a database of DATABASES."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS
from django.db.utils import ConnectionDoesNotExist

from ....._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE
from ..._clients import connection_string
from ..._settings import TableNames, table_names

DEFAULTS = TableNames(CHUNKS_TABLE, STATUS_TABLE, CONVERSATIONS_TABLE)


class Command(BaseCommand):
    """Runs the command line of this package. Its options and exit codes are those of `aibind-postgres`."""

    help = "Runs a command of aibind-postgres. --database ALIAS, before the command, selects the database."
    requires_system_checks: Sequence[str] = []

    def run_from_argv(self, argv: list[str]) -> None:
        """Run the arguments of the command line."""
        try:
            self._run(argv[2:])
        except CommandError as error:
            self.stderr.write(f"aibind: {error}")
            sys.exit(error.returncode)

    def print_help(self, prog_name: str, subcommand: str) -> None:
        """Print the help of the command line."""
        self._run(["--help"])

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Accept the arguments of `call_command`."""
        parser.add_argument("args", nargs=argparse.REMAINDER)

    def handle(self, *args: str, **options: Any) -> None:
        """Run the arguments of `call_command`. It raises SystemExit with the exit code."""
        self._run(list(args))

    def _run(self, arguments: list[str]) -> None:
        try:
            from .....cli import app
        except ModuleNotFoundError as error:
            raise CommandError(
                f"the command needs {error.name}: pip install 'aibind-postgres[cli]'", returncode=2
            ) from None
        own, others = split_arguments(arguments)
        try:
            # Not an argument: the arguments of a process, and so its password, are visible to other users.
            os.environ["DATABASE_URL"] = connection_string(own)
        except (ConnectionDoesNotExist, TypeError) as error:
            raise CommandError(str(error), returncode=2) from None
        sys.argv = ["aibind-postgres", *with_tables(others, app.app, table_names())]
        app.run()


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the alias of --database, which comes before the command, and the arguments of the command line.

    `--settings` and `--pythonpath` are removed: `manage.py` itself has read them.
    """
    parser = argparse.ArgumentParser(prog="manage.py aibind", add_help=False, allow_abbrev=False)
    parser.add_argument("--settings")
    parser.add_argument("--pythonpath")
    _, rest = parser.parse_known_args(arguments)
    if rest and rest[0].startswith("--database="):
        return rest[0].partition("=")[2], rest[1:]
    if len(rest) >= 2 and rest[0] == "--database":
        return rest[1], rest[2:]
    return DEFAULT_DB_ALIAS, rest


def with_tables(arguments: list[str], app: Any, names: TableNames) -> list[str]:
    """Add the names of the tables that differ from the defaults, for a command that has options for them."""
    from typer.main import get_command

    options = {
        f"--{kind}-table": name
        for kind, name, default in zip(TableNames._fields, names, DEFAULTS, strict=True)
        if name != default
    }
    command: Any = get_command(app)
    position = 0
    while position < len(arguments) and arguments[position] in getattr(command, "commands", {}):
        command = command.commands[arguments[position]]
        position += 1
    known = {option for parameter in command.params for option in parameter.opts}
    added = [part for option, name in options.items() if option in known for part in (option, name)]
    return [*arguments[:position], *added, *arguments[position:]]
