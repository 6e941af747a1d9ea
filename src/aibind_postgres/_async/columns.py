"""The columns of the tables of a store, which show the applied migrations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .._sql import COLUMNS
from .._sqlstate import HOW_TO_MIGRATE
from ..errors import SchemaError

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .._tables import Table
    from .database import AsyncDatabase


def missing_migration(feature: str, migration: str, table: Table, lack: str) -> SchemaError:
    """Return the error for a feature that needs a migration. `lack` says what the table lacks."""
    return SchemaError(
        f"{feature} needs migration {migration}, since the table {table.quoted} {lack}. Apply all migrations "
        f"{HOW_TO_MIGRATE}; or correct the table names given to the store"
    )


class Columns(NamedTuple):
    """The columns of a table; none if the table does not exist.

    Attributes:
        names: The names of the columns.
        found_at: The time of the look-up, by `monotonic`.
    """

    names: frozenset[str]
    found_at: float


class AsyncQuery(Protocol):
    """Runs a statement and returns its rows."""

    async def __call__(self, sql: str, params: Sequence[object], /) -> Sequence[Row]: ...


class AsyncColumnCatalog:
    """Looks up the columns of tables in the catalog, once for each table.

    Features that need a migration ask it first: a statement that names a missing column would abort a transaction of
    the caller.
    """

    def __init__(self, database: AsyncDatabase) -> None:
        self._database = database
        self._known: dict[Table, Columns] = {}

    async def of(self, table: Table, query: AsyncQuery | None = None, *, again: bool = False) -> Columns:
        """Return the columns of a table, as of the first look-up or the last call of `require` that missed one.

        Args:
            table: The table.
            query: Runs the statement. Default: the client of the store.
            again: Whether to look them up again.
        """
        known = None if again else self._known.get(table)
        return known or await self._look_up(table, query or self._database.query)

    async def require(self, table: Table, names: Collection[str], feature: str, migration: str) -> Columns:
        """Return the columns of a table. Look them up again if one is missing: it may have been added since.

        Args:
            table: The table.
            names: The names of the columns that it must have.
            feature: The feature that needs them, for the error text.
            migration: The migration that adds them, for the error text.

        Raises:
            SchemaError: A column is missing.
        """
        columns = self._known.get(table)
        if columns is None or not columns.names.issuperset(names):
            columns = await self._look_up(table, self._database.query)
        if missing := [name for name in names if name not in columns.names]:
            lack = f"has no column {', '.join(missing)}" if columns.names else "does not exist"
            raise missing_migration(feature, migration, table, lack)
        return columns

    async def _look_up(self, table: Table, query: AsyncQuery) -> Columns:
        rows = await query(COLUMNS, [table.quoted])
        columns = Columns(frozenset(name for (name,) in rows), monotonic())
        self._known[table] = columns
        return columns
