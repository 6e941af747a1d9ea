"""Objects of the package that are still in memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Container

PER_CONNECTION = {"Session", "Statement"}  # a few for each open connection


def package_objects(*, except_for: Container[str] = ()) -> Counter[str]:
    """Count the living objects of the package by class, without the classes of `except_for`.

    `package_objects() - before` holds the additional ones, and is empty if there are none.
    """
    gc.collect()
    classes = (type(found) for found in gc.get_objects())
    names = [kind.__qualname__ for kind in classes if str(kind.__module__).startswith("aibind_postgres")]
    return Counter(name for name in names if name not in except_for)
