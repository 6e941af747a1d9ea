"""Sessions of nox. `nox` runs the checks that a change must pass; `nox -s tests` tests all versions."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
POSTGRES = ["14", "15", "16", "17", "18"]

# The extra `embedded` brings 16 and 18. The others are packages of Debian or the PGDG repository.
SYSTEM_SERVERS = {version: Path(f"/usr/lib/postgresql/{version}/bin/initdb") for version in ("14", "15", "17")}

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", f"tests-{HERE}(postgres='18')", "package", "processes"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


def skip_without_server(session: nox.Session, postgres: str) -> None:
    """Skip a session if this version of PostgreSQL is not installed."""
    program = SYSTEM_SERVERS.get(postgres)
    if program is not None and not program.exists():
        session.skip(f"PostgreSQL {postgres} is not installed: {program} is missing")


@nox.session
def sync(session: nox.Session) -> None:
    """Generate the synchronous flavour. `nox -s sync -- --check` only compares."""
    session.install(*PROJECT["build-system"]["requires"])
    session.run("python", "scripts/unasync.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style, the format, and that the generated code is up to date."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "scripts/unasync.py", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of both flavours and of the public API."""
    session.install(".[dev]")
    session.run("mypy")


@nox.session(python=list(dict.fromkeys([*PYTHONS, HERE])))
@nox.parametrize("postgres", POSTGRES)
def tests(session: nox.Session, postgres: str) -> None:
    """Run the tests with one version of Python and PostgreSQL."""
    skip_without_server(session, postgres)
    session.install(".[dev]")
    env = {"AIBIND_TEST_POSTGRES": postgres, "AIBIND_TEST_DSN": None}
    session.run("pytest", "tests", *session.posargs, env=env)


@nox.session
@nox.parametrize("postgres", ["15", "18"])
@nox.parametrize("partitions", ["8", "time"])
def partitions(session: nox.Session, postgres: str, partitions: str) -> None:
    """Run the tests that use tables on eight partitions by hash, or on partitions by time."""
    skip_without_server(session, postgres)
    session.install(".[dev]")
    folders = ["tests/_async", "tests/_sync", "tests/integration", "tests/contrib"]
    env = {"AIBIND_TEST_POSTGRES": postgres, "AIBIND_TEST_DSN": None, "AIBIND_TEST_PARTITIONS": partitions}
    session.run("pytest", *folders, *session.posargs, env=env)


@nox.session
def grants(session: nox.Session) -> None:
    """Run the tests of the stores as a role with exactly the grants of docs/doctor.md."""
    session.install(".[dev]")
    env = {"AIBIND_TEST_ROLE": "aibind_test_role", "AIBIND_TEST_DSN": None}
    session.run("pytest", "tests/_async", "tests/_sync", *session.posargs, env=env)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest version of each dependency that pyproject.toml permits, on the oldest Python."""
    session.install("uv")
    target = f"--python={session.virtualenv.location}"
    session.run("uv", "pip", "install", target, "--resolution=lowest-direct", ".[dev]")
    session.run("pytest", "tests", *session.posargs, env={"AIBIND_TEST_DSN": None})


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist, and test them in new environments."""
    session.install(".[dev]")
    session.run("pytest", "tests/packaging", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site in build/site. Warnings, such as of broken links, are errors."""
    session.install(".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def release(session: nox.Session) -> None:
    """Build the packages into dist, and try the wheel in an empty environment. `-- --tag v1.2.3` checks a tag."""
    session.install("build", "twine>=7")  # older ones refuse the metadata of hatchling
    session.run("python", "scripts/release.py", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """Run each benchmark for an instant."""
    session.install(".[dev]")
    session.run("pytest", "tests/benchmarks", *session.posargs)


@nox.session
def processes(session: nox.Session) -> None:
    """Test programs: web servers, workers, the command line, examples, and the published clients in Node.js."""
    session.install(".[dev]")
    session.run("pytest", "tests/processes", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Test the chat, `useChat` of the AI SDK, and the site in Chromium. `useChat` needs Node.js with npm."""
    session.install(".[dev,docs]")
    session.run("pytest", "tests/browser", "--long", "--timeout=300", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Test failures of servers, networks and processes, as often as the guarantees state."""
    session.install(".[dev]")
    # Four processes also on two processors, since the tests wait most of the time.
    options = ["--long", "--ignore-glob=*/test_soak.py", "--timeout=1200", "-n", "4", "--dist", "worksteal"]
    session.run("pytest", "tests/faults", *options, *session.posargs)


@nox.session(name="faults-short")
def faults_short(session: nox.Session) -> None:
    """Test the same failures, each a few times."""
    session.install(".[dev]")
    session.run("pytest", "tests/faults", "-n", "4", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run many chats for ten minutes in each flavour, with a server restart halfway."""
    session.install(".[dev]")
    session.run("pytest", "tests/faults", "--long", "-k", "soak", "--timeout=1200", *session.posargs)


@nox.session
def screenshots(session: nox.Session) -> None:
    """Take the screenshots in docs/images. Needs Chromium, and Node.js with npm."""
    session.install(".[dev,docs]", "pillow")
    session.run("python", "-m", "support.screenshots", env={"PYTHONPATH": "tests"})


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Compare with pgbench, Redis and plain psycopg, and write the results to benchmarks/README.md."""
    session.install(".[benchmarks]")
    session.run("python", "-m", "benchmarks", "--json", "results.json", *session.posargs)
    session.run("python", "-m", "benchmarks.report", "results.json")
