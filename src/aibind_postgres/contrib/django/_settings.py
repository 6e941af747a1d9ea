"""The setting AIBIND_POSTGRES: the names of the tables. Its checks are pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from django.conf import settings

from ..._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table, parse_distinct

NAME = "AIBIND_POSTGRES"

_DEFAULTS = {
    "CHUNKS_TABLE": CHUNKS_TABLE,
    "STATUS_TABLE": STATUS_TABLE,
    "CONVERSATIONS_TABLE": CONVERSATIONS_TABLE,
}


class TableNames(NamedTuple):
    """The names of the tables, as a store accepts them."""

    chunks: str
    status: str
    conversations: str


def parse(value: Any) -> tuple[TableNames, list[str]]:
    """Return the names of the setting's value, and its problems. With a problem, the names are the defaults."""
    defaults = TableNames(*_DEFAULTS.values())
    if not isinstance(value, dict):
        return defaults, [f"{NAME} must be a dict, not {type(value).__name__}"]
    problems = [
        f"{NAME} has the unknown key {key!r}: the keys are {', '.join(_DEFAULTS)}"
        for key in value
        if key not in _DEFAULTS
    ]
    names = TableNames(*({**_DEFAULTS, **value}[key] for key in _DEFAULTS))
    for key, name in zip(_DEFAULTS, names, strict=True):
        try:
            Table.parse(name)
        except (TypeError, ValueError) as error:
            problems.append(f"{NAME}[{key!r}]: {error}")
    if not problems:
        try:
            parse_distinct(*names)
        except ValueError as error:
            problems.append(f"{NAME}: {error}")
    return (defaults if problems else names), problems


def table_names() -> TableNames:
    """Return the names of the tables. With an invalid setting, which the system check reports, the defaults."""
    return parse(getattr(settings, NAME, {}))[0]


def as_db_table(name: str) -> str:
    """Return a table name for the option `db_table` of a model. Django leaves a quoted name unchanged."""
    table = Table.parse(name)
    return table.name if table.schema is None else table.quoted
