"""The checks: `nox` runs those that a change must pass, `nox -s tests` all versions of Python and PostgreSQL."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = list(dict.fromkeys(["3.10", "3.11", "3.12", "3.13", HERE]))

# 16 and 18 come with the `embedded` extra, 15 from the system, where it is installed.
SYSTEM_SERVERS = {"15": Path("/usr/lib/postgresql/15/bin/initdb")}

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "types", f"tests-{HERE}(postgres='18')", "package"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


@nox.session
def sync(session: nox.Session) -> None:
    """Write the synchronous flavour; `nox -s sync -- --check` only tells whether it is what the sources give."""
    session.install(*nox.project.load_toml("pyproject.toml")["build-system"]["requires"])
    session.run("python", "scripts/unasync.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format, and that the conversion is complete."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "scripts/unasync.py", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of both flavours, and those that a caller sees."""
    session.install(".[dev]")
    session.run("mypy")


@nox.session(python=PYTHONS)
@nox.parametrize("postgres", ["15", "16", "18"])
def tests(session: nox.Session, postgres: str) -> None:
    """Run the tests, on what pip installs."""
    program = SYSTEM_SERVERS.get(postgres)
    if program is not None and not program.exists():
        session.skip(f"there is no PostgreSQL {postgres} here: {program} is missing")
    session.install(".[dev]")
    session.run("pytest", *session.posargs, env={"AIBIND_TEST_POSTGRES": postgres, "AIBIND_TEST_DSN": None})


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist, and check both where nothing else is installed."""
    session.install(".[dev]")
    session.run("pytest", "tests/packaging", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Break servers, networks and processes, as often as the promises say."""
    session.install(".[dev]")
    # Four side by side, on two processors: they wait for most of the time.
    options = ["--long", "--ignore-glob=*/test_soak.py", "--timeout=1200", "-n", "4", "--dist", "worksteal"]
    session.run("pytest", "tests/faults", *options, *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run many chats for ten minutes in each flavour, with a restart of the server in the middle."""
    session.install(".[dev]")
    session.run("pytest", "tests/faults", "--long", "-k", "soak", "--timeout=1200", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure beside pgbench, Redis and plain psycopg, and write the results into the benchmarks' page."""
    session.install(".[benchmarks]")
    session.run("python", "-m", "benchmarks", "--json", "results.json", *session.posargs)
    session.run("python", "-m", "benchmarks.report", "results.json")
