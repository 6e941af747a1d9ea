"""Flask, as an application may have it around the blueprint."""

from __future__ import annotations

import pytest
from flask import Flask, current_app, request

from aibind_postgres import PostgresStreamStore, StreamHandler
from aibind_postgres.contrib.flask import blueprint


def generate(generation):
    yield f"{generation.prompt} in {current_app.name}"


@pytest.fixture
def app(dsn, tables):
    with PostgresStreamStore(dsn, **tables) as store:
        app = Flask("shop")
        app.register_blueprint(blueprint(StreamHandler(generate, store=store, max_body=100)))
        app.register_blueprint(blueprint(StreamHandler(generate, store=store, prefix="/v1.2/ai")))
        yield app


def test_a_source_has_the_context_of_its_application(app):
    answer = app.test_client().post("/__aibind__/stream", json={"prompt": "hi"})
    assert b"data: hi in shop\n" in answer.data


def test_what_others_have_read_of_a_request_before_is_read_again(app):
    seen = []
    app.before_request(lambda: seen.append(request.get_json()))
    answer = app.test_client().post("/__aibind__/complete", json={"input": "hi"})
    assert answer.data == b"hi in shop"
    assert seen == [{"input": "hi"}]


def test_two_handlers_in_one_application(app):
    client = app.test_client()
    assert client.post("/__aibind__/complete", json={"input": "one"}).data == b"one in shop"
    assert client.post("/v1.2/ai/complete", json={"input": "two"}).data == b"two in shop"
    assert client.post("/v1.2/ai/complete", json={"input": "x" * 100}).status_code == 200
    assert client.post("/__aibind__/complete", json={"input": "x" * 100}).status_code == 413
