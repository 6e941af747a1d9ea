"""docs/typescript.md has a row for each export of the npm package."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "typescript.md").read_text("utf-8")

# The exports of `@aibind/postgres` 0.4.0, in the order of its index.
EXPORTS = [
    "wrapPostgresJs",
    "wrapNeon",
    "PostgresClient",
    "PostgresResult",
    "PostgresStreamStore",
    "PostgresStreamStoreOptions",
    "PostgresConversationStore",
    "PostgresConversationStoreOptions",
]


def test_every_export_has_a_row() -> None:
    section = PAGE.partition("\n## Exports\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(EXPORTS)
