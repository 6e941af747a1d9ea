"""System checks: the setting AIBIND_POSTGRES, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.db import DatabaseError, connections, router

from ..._tables import Table
from . import _settings
from .models import Stream


def check_settings(**_: Any) -> list[CheckMessage]:
    """Check the setting AIBIND_POSTGRES and the kind of the database."""
    problems = _settings.parse(getattr(settings, _settings.NAME, {}))[1]
    found: list[CheckMessage] = [
        Error(
            problem,
            hint=f'Example: {_settings.NAME} = {{"CHUNKS_TABLE": "chat.chunks", "STATUS_TABLE": "chat.status"}}.',
            id="aibind_postgres.E001",
        )
        for problem in problems
    ]
    alias = router.db_for_write(Stream)
    vendor = connections[alias].vendor
    if vendor != "postgresql":
        found.append(
            Error(
                f"The tables of aibind_postgres need PostgreSQL, but the database {alias!r} is {vendor}.",
                hint="Let a router of DATABASE_ROUTERS return the alias of a PostgreSQL database for the app label "
                "'aibind_postgres'.",
                id="aibind_postgres.E002",
            )
        )
    return found


def check_tables(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Check that the tables exist, in `check --database` and before `migrate`."""
    alias = router.db_for_write(Stream)
    if alias not in (databases or ()) or connections[alias].vendor != "postgresql":
        return []
    names = _settings.table_names()
    quoted = [Table.parse(name).quoted for name in names]
    try:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NULL", [quoted])
            missing = [name for (name,) in cursor.fetchall()]
    except DatabaseError as error:  # which Django's own checks do not report
        return [
            Warning(
                f"The tables in the database {alias!r} could not be checked: {error}",
                hint="Check that the server runs, and the connection in DATABASES.",
                id="aibind_postgres.W002",
            )
        ]
    if not missing:
        return []
    option = "" if alias == "default" else f" --database {alias}"
    return [
        Warning(
            f"The database {alias!r} has no tables {', '.join(missing)}.",
            hint=f"Run `manage.py migrate aibind_postgres{option}`.",
            id="aibind_postgres.W001",
        )
    ]
