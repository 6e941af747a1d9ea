"""Objects of the package that are still in memory."""

from __future__ import annotations

import gc
from collections import Counter


def package_objects() -> Counter[str]:
    """Count the living objects of the package by class.

    `package_objects() - before` holds the additional ones, and is empty if there are none.
    """
    gc.collect()
    classes = (type(found) for found in gc.get_objects())
    return Counter(kind.__qualname__ for kind in classes if str(kind.__module__).startswith("aibind_postgres"))
