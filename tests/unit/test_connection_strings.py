"""Connection strings: defaults that respect services and variables, and errors that name the problem but no secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore
from aibind_postgres._conninfo import DEFAULTS, missing_defaults, with_defaults

SERVICE = {"connect_timeout": "3", "keepalives_idle": "99", "tcp_user_timeout": "1"}


@pytest.fixture(autouse=True)
def service_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGSERVICE", "PGCONNECT_TIMEOUT", "PGCLIENTENCODING"):
        monkeypatch.delenv(name, raising=False)
    settings = {**SERVICE, "host": "one.invalid,two.invalid", "hostaddr": "192.0.2.1,192.0.2.2", "port": "1,2"}
    file = tmp_path / "services"
    file.write_text("\n".join(["[mine]", *(f"{name}={value}" for name, value in settings.items())]))
    monkeypatch.setenv("PGSERVICEFILE", str(file))


@pytest.mark.parametrize(
    "conninfo",
    ["service=mine", "service=mine host=h", "postgresql://u@h/d?service=mine", "postgresql:///?service=mine"],
)
def test_settings_of_a_service_are_kept(conninfo: str) -> None:
    given = conninfo_to_dict(conninfo)
    assert conninfo_to_dict(with_defaults(conninfo)) == {**given, **DEFAULTS, **SERVICE}
    assert missing_defaults({**given, "tcp_user_timeout": "2"}) == {
        name: value for name, value in {**DEFAULTS, **SERVICE}.items() if name != "tcp_user_timeout"
    }


def test_settings_of_the_service_in_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICE", "mine")
    assert conninfo_to_dict(with_defaults("")) == {**DEFAULTS, **SERVICE}


def test_settings_of_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "4")
    assert conninfo_to_dict(with_defaults("service=mine connect_timeout=5"))["connect_timeout"] == "5"
    assert conninfo_to_dict(with_defaults("host=h"))["connect_timeout"] == "4"


def test_other_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conninfo_to_dict(with_defaults("host=h", connect_timeout="2")) == {
        "host": "h",
        **DEFAULTS,
        "connect_timeout": "2",
    }
    assert conninfo_to_dict(with_defaults("connect_timeout=5", connect_timeout="2"))["connect_timeout"] == "5"
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "4")
    assert conninfo_to_dict(with_defaults("", connect_timeout="2"))["connect_timeout"] == "4"


def test_missing_service_is_left_to_the_driver() -> None:
    assert conninfo_to_dict(with_defaults("service=other")) == {"service": "other", **DEFAULTS}


@pytest.mark.parametrize(
    ("conninfo", "text"),
    [
        ("postgres://me:geheim@h:6543/db?supa=base-pooler.x", "'supa': remove it"),
        ("postgresql://me:geheim@h/db?pgbouncer=true&sslmode=require&schema=x", "'pgbouncer', 'schema': remove"),
        ("postgresql://h?%73chema=geheim", "'schema': remove it"),
        ("postgresql+asyncpg://me:geheim@h/db", "'postgresql+asyncpg': write postgresql://"),
        ("jdbc:postgresql://h/db?user=me&password=geheim", "'jdbc:postgresql': write postgresql://"),
        ("POSTGRES://me:geheim@h/db", "'POSTGRES': write postgresql://"),
        ("mysql://me:geheim@h/db", "'mysql': write postgresql://"),
        ("psql 'postgresql://me:geheim@h/db'", "must begin with postgresql://"),
        ("DATABASE_URL=postgres://me:geheim@h/db", "must begin with postgresql://"),
        (" postgresql://me:geheim@h/db", "must begin with postgresql://"),
        # A part of a password could look like a parameter.
        ("postgresql://me:ge?geheim=x", "%40"),
        ("postgresql://me:1?geheim=x@h/db?supa=x", "%40"),
        ("postgresql://h/db?password=ge&geheim=x", "%40"),
        ("postgresql://h/db?geheim", "%40"),
        ("postgresql://me:geheim/geheim@h/db", "%2F"),
        ("password=x geheim=y", "%40"),
        ("geheim://", "%40"),
        ("geheim", "%40"),
    ],
)
def test_error_names_the_problem_without_secrets(conninfo: str, text: str) -> None:
    for store in (PostgresStreamStore, AsyncPostgresStreamStore):
        with pytest.raises(ValueError, match="connection string") as caught:
            store(conninfo)
        assert text in str(caught.value)
        assert "geheim" not in str(caught.value)
        assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "conninfo", ["postgresql://h/db?ssl=true", "postgres://h/db?sslmode=require&channel_binding=require"]
)
def test_known_parameters_are_accepted(conninfo: str) -> None:
    assert conninfo_to_dict(with_defaults(conninfo))["sslmode"] == "require"
