"""Fixtures: a second store on a connection string, and Django's settings."""

from __future__ import annotations

import pytest
from contrib import contract
from psycopg.conninfo import make_conninfo

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore


# Its connections have a name, so that a test can end the other connections only.
@pytest.fixture
def theirs(dsn, tables):
    with PostgresStreamStore(make_conninfo(dsn, application_name="stays"), **tables) as store:
        yield store


@pytest.fixture
async def async_theirs(dsn, tables):
    async with AsyncPostgresStreamStore(make_conninfo(dsn, application_name="stays"), **tables) as store:
        yield store


@pytest.fixture(scope="session")
def django_databases(dsn):
    """Django's settings, of which a process can have one."""
    import django
    from django.conf import settings

    names = {"dbname": "NAME", "host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD"}
    found = contract.parameters(dsn, **names)
    base = {name: found.pop(name) for name in names.values() if name in found}
    base |= {"ENGINE": "django.db.backends.postgresql", "OPTIONS": found}
    pool = {"min_size": 1, "max_size": 4}
    settings.configure(
        DATABASES={
            "default": base,
            "server_side": base | {"OPTIONS": {**found, "server_side_binding": True}},
            "pooled": base | {"OPTIONS": {**found, "pool": pool}},
            "tenants": base | {"ENGINE": "support.tenant_backend"},
            "unreachable": base | {"HOST": "127.0.0.1", "PORT": "1"},
            "lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        },
        USE_TZ=True,
        TIME_ZONE="America/New_York",
        LOGGING_CONFIG=None,
    )
    django.setup()
