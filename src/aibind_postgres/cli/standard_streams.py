"""The standard streams of a command, including streams that are closed or cannot be written."""

from __future__ import annotations

import errno
import os
import sys

from rich.console import Console

# Errors of files. Those of sockets, such as an address in use, differ.
_FILE_ERRORS = {errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}


def open_closed_streams() -> None:
    """Open standard streams that are closed, so that no connection to a server gets their numbers.

    Reading the input and writing the output then fail with EBADF. Messages to a closed standard error are dropped.
    """
    for descriptor, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            _redirect_to_nothing(descriptor, flags)
    # Python sets these to None if they are closed. `print` would then write messages to the standard output.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # open until the process ends
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # the same
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115  # the same


def discard_output() -> None:
    """Discard output that cannot be written. Otherwise Python reports the error again when it exits."""
    _redirect_to_nothing(1, os.O_WRONLY)


def _redirect_to_nothing(descriptor: int, flags: int) -> None:
    nothing = os.open(os.devnull, flags)
    if nothing == descriptor:
        os.set_inheritable(nothing, True)
    else:
        os.dup2(nothing, descriptor)
        os.close(nothing)


def print_message(text: str) -> None:
    """Print a message to standard error."""
    try:
        print(f"aibind-postgres: {text}", file=sys.stderr, flush=True)
    except OSError:  # a full disk, or a closed pipe: there is no other place for it
        _redirect_to_nothing(2, os.O_WRONLY)  # Python flushes it again when it exits


def describe_error(error: OSError) -> str:
    """Return the text of an error. If the standard output cannot be written, name and discard it."""
    if error.filename is None and error.errno in _FILE_ERRORS:
        discard_output()
        return f"standard output cannot be written: {error.strerror}"
    return str(error)


def output_console(*, soft_wrap: bool) -> Console:
    """Return a console for the standard output: with colours and styles on a terminal only, and not under NO_COLOR."""
    is_plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    return Console(
        color_system=None if is_plain else "auto",
        force_terminal=sys.stdout.isatty(),  # FORCE_COLOR does not count
        highlight=False,
        markup=False,
        soft_wrap=soft_wrap,
    )
