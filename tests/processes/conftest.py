"""Fixtures: each web server in turn, its database, and a store on it."""

from __future__ import annotations

import pytest
from psycopg.conninfo import make_conninfo
from support import servers, webapps
from support.webapps import SERVERS

from aibind_postgres import PostgresStreamStore


@pytest.fixture(scope="module")
def web_database(server, template):
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture(scope="module", params=SERVERS)
def client(request, web_database):
    with webapps.running(request.param, web_database) as client:
        yield client


@pytest.fixture
def store(web_database):
    """A store on the database of the servers, in the process of the tests."""
    with PostgresStreamStore(make_conninfo(web_database, application_name="test")) as store:
        yield store
