"""`flask aibind …`: the commands of `aibind-postgres` on the database of a Flask application."""

from __future__ import annotations

import os
import sys

import click
from flask import current_app
from flask.cli import with_appcontext

from . import main

SETTING = "DATABASE_URL"


# Typer contains a copy of click, so its commands cannot be added to a group of Flask. The arguments are passed on.
@click.command(
    "aibind", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@with_appcontext
def command(arguments: tuple[str, ...]) -> None:
    """Run a command of aibind-postgres on the database of the application."""
    if database := current_app.config.get(SETTING):
        os.environ[SETTING] = database  # for this process only; --dsn overrides it
    sys.argv = ["flask aibind", *arguments]
    main()
