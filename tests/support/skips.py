"""Skip tests that are named in a table, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest


def skip_named(items: Iterable[pytest.Item], named: Mapping[str, Iterable[str]], where: str) -> None:
    """Skip tests by their file, their function, or their function with its parameters.

    Args:
        items: The tests.
        named: The names, such as `test_clients::test_query`, by the reason.
        where: Begins the reason.
    """
    reasons = {name: reason for reason, names in named.items() for name in names}
    for item in items:
        name = f"{item.path.stem}::{item.name}"
        found = [reasons[key] for key in (name, name.split("[")[0], item.path.stem) if key in reasons]
        if found:
            item.add_marker(pytest.mark.skip(reason=f"{where}: {found[0]}"))
