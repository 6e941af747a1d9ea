"""Flask, as an application may have it around the blueprint."""

from __future__ import annotations

from threading import Event

import pytest
from flask import Flask, current_app, g, request
from support.concurrency import until

from aibind_postgres import AsyncPostgresStreamStore, AsyncStreamHandler, PostgresStreamStore, StreamHandler
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


def test_what_a_source_opens_in_its_application_is_torn_down_when_it_ends(app, dsn, tables):
    events, request_over = [], Event()

    def resource():
        if "resource" not in g:
            g.resource = object()
            events.append("up")
        return g.resource

    @app.teardown_appcontext
    def tear_down(error):
        if g.pop("resource", None) is not None:
            events.append("down")

    def use(generation):
        assert request_over.wait(20)
        mine = resource()
        yield "a"
        assert resource() is mine
        yield "b"
        events.append("the end")

    with PostgresStreamStore(dsn, **tables) as store:
        app.register_blueprint(blueprint(StreamHandler(use, store=store, prefix="/ai")))
        app.before_request(lambda: resource() and None)
        answer = app.test_client().post("/ai/stream", json={"prompt": "hi"})
        assert events == ["up", "down"]
        request_over.set()
        assert b"event: done" in answer.data
        until(lambda: events == ["up", "down", "up", "the end", "down"])


def test_an_asynchronous_handler_is_refused():
    with pytest.raises(TypeError, match="Flask takes a StreamHandler, not AsyncStreamHandler"):
        blueprint(AsyncStreamHandler(generate, store=AsyncPostgresStreamStore("")))
