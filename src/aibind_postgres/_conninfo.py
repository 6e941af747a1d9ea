"""Check connection strings, and add defaults for parameters that are set nowhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, PGconn

# Defaults for parameters that are set neither in the connection string nor in the environment nor by a service. The
# timeouts detect a lost server or network within a minute (tcp_user_timeout is in milliseconds). With client_encoding,
# psycopg returns text from a database without an encoding.
DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "tcp_user_timeout": "10000",
    "client_encoding": "UTF8",
}

# A URL in which no part of a password can be parsed as the host or the database.
_UNAMBIGUOUS = re.compile(r"postgres(ql)?://([^@/?]*@)?[^@?]*(\?.*)?", re.DOTALL)


def with_defaults(conninfo: str, **others: str) -> str:
    """Add `DEFAULTS` for parameters that are not set.

    Args:
        conninfo: The connection string.
        others: Defaults in place of those of the same names.

    Raises:
        ValueError: The string is malformed, or a password that is not percent-encoded would be parsed as the host, the
            port or the database. Unlike the driver's errors, this error does not quote a part of the password.
    """
    with suppress(psycopg.ProgrammingError, UnicodeEncodeError):
        given = conninfo_to_dict(conninfo)
        is_unambiguous = _UNAMBIGUOUS.fullmatch(conninfo) or not re.match(r"postgres(ql)?://", conninfo)
        if is_unambiguous and re.fullmatch("[0-9, ]*", str(given.get("port", ""))):
            return make_conninfo(conninfo, **missing_defaults(given, others))
    raise ValueError(
        f"not a connection string of PostgreSQL, such as postgresql://user@host/database: {_reason(conninfo)}"
    )


def missing_defaults(given: Mapping[str, Any], others: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return `DEFAULTS` that these libpq parameters do not set, with the values of the service or the environment.

    The values are copied because psycopg itself reads no services. `others` replaces defaults of the same names.
    """
    # libpq reads the variables and the service. The address is a file, so the connection fails without a network.
    nowhere = {"host": "/dev/null", "hostaddr": "", "port": "1"}
    service = {name: given[name] for name in ("service", "servicefile") if name in given}
    connection = PGconn.connect_start(make_conninfo("", **nowhere, **service).encode())
    found = {option.keyword.decode(): (option.val or b"").decode() for option in connection.info}
    connection.finish()
    return {name: found[name] or value for name, value in {**DEFAULTS, **others}.items() if name not in given}


def _reason(conninfo: str) -> str:
    """Return why a string is refused, and the remedy, without any part of it that could belong to a password."""
    scheme, separator, _ = conninfo.partition("://")
    if separator and scheme not in ("postgres", "postgresql"):
        if re.fullmatch(r"(jdbc:)?[a-z0-9+.-]*(postg|sql)[a-z0-9+.-]*", scheme, re.IGNORECASE):
            return f"libpq does not know the scheme {scheme!r}: write postgresql://"
        if re.search(r"postgres(ql)?$", scheme):
            return "it must begin with postgresql://, without a command, a name or quotes around it"
    address, _, query = conninfo.partition("?")
    if re.fullmatch(r"postgres(ql)?://([^@/]*@)?[^@/:]*(:[0-9,]*)?(/[^@]*)?", address) and not re.search(
        "@|pass", query
    ):
        names = {unquote(pair.partition("=")[0]): None for pair in query.split("&") if "=" in pair}
        known = {"ssl", *(option.keyword.decode() for option in Conninfo.get_defaults())}
        if unknown := [repr(name) for name in names if name not in known]:
            return f"libpq does not know the parameter {', '.join(unknown)}: remove it"
    return "in a user's name or password, write @ as %40, / as %2F, and % as %25"
