"""Export files: a new one appears only when it is complete, and a damaged one is reported with the line."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import InvalidDataError
from .export_format import FileError

STANDARD_OUTPUT = "-"
GZIP_MAGIC = b"\x1f\x8b"
BUFFER_BYTES = 1 << 16


@contextmanager
def new_file(name: str) -> Iterator[IO[bytes]]:
    """Write to `NAME.partial`, which gets its name at the end of the block. If the block raises, it is deleted.

    Args:
        name: The name of the file, or `-` for standard output. One that ends with `.gz` is compressed, with the same
            bytes each time.

    Raises:
        InvalidDataError: The name is that of a directory or a device, or the partial file exists.
    """
    if name == STANDARD_OUTPUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(os.path.realpath(name))  # of a symbolic link, the file that it refers to is replaced
    if path.exists() and not path.is_file():
        raise InvalidDataError(f"{name} is not a file: give the name of a file, or - for standard output")
    partial = path.with_name(f"{path.name}.partial")
    try:
        # Readable only by the user that runs the command, since the file contains the texts of all users.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidDataError(
            f"{partial} exists: another export is writing it, or was killed. Delete it if no export is running"
        ) from None
    try:
        with open(descriptor, "wb", buffering=BUFFER_BYTES) as raw:
            if name.endswith(".gz"):
                with (
                    gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as compressed,
                    io.BufferedWriter(compressed, BUFFER_BYTES) as buffered,
                ):
                    yield buffered
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # such as a full disk
            error.filename = str(partial)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The new name must survive a crash of the machine as well.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ExportFile:
    """A file that is read twice, compressed or not.

    Args:
        name: The name of the file.

    Raises:
        InvalidDataError: It is not a file, such as a pipe.
    """

    def __init__(self, name: str) -> None:
        self._raw = open(name, "rb")  # noqa: SIM115  # closed by `close`
        if not stat.S_ISREG(os.fstat(self._raw.fileno()).st_mode):
            self._raw.close()
            raise InvalidDataError(f"{name} is not a file: import reads a file twice, so it cannot read a pipe")
        self._version = self._read_version()

    def __enter__(self) -> ExportFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    @property
    def size(self) -> int:
        """The size in bytes, as stored."""
        return os.fstat(self._raw.fileno()).st_size

    @property
    def position(self) -> int:
        """The number of bytes that have been read, as stored."""
        return self._raw.tell()

    def _read_version(self) -> tuple[int, int]:
        status = os.fstat(self._raw.fileno())
        return status.st_size, status.st_mtime_ns

    def lines(self) -> Iterator[bytes]:
        """Yield the lines from the start.

        Raises:
            FileError: The compressed data are damaged or cut off, or the file was changed since it was opened.
        """
        self._raw.seek(0)
        is_compressed = self._raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        self._raw.seek(0)
        number = 0
        try:
            for line in gzip.GzipFile(fileobj=self._raw) if is_compressed else self._raw:
                number += 1
                yield line
        except EOFError:
            raise FileError(number + 1, "the compressed file is cut off") from None
        except (zlib.error, gzip.BadGzipFile):
            raise FileError(number + 1, "the compressed file is damaged") from None
        if self._read_version() != self._version:
            raise FileError(number, "the file was changed while it was read")
