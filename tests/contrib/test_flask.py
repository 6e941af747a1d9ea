"""The Flask blueprint inside an application."""

from __future__ import annotations

from threading import Event

import pytest
from flask import Flask, abort, current_app, g, redirect, request
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


def test_source_runs_in_application_context(app):
    response = app.test_client().post("/__aibind__/stream", json={"prompt": "hi"})
    assert b"data: hi in shop\n" in response.data


def test_body_that_was_read_before_the_view(app):
    bodies = []
    app.before_request(lambda: bodies.append(request.get_json()))
    response = app.test_client().post("/__aibind__/complete", json={"input": "hi"})
    assert response.data == b"hi in shop"
    assert bodies == [{"input": "hi"}]


def test_two_handlers_in_one_application(app):
    client = app.test_client()
    assert client.post("/__aibind__/complete", json={"input": "one"}).data == b"one in shop"
    assert client.post("/v1.2/ai/complete", json={"input": "two"}).data == b"two in shop"
    assert client.post("/v1.2/ai/complete", json={"input": "x" * 100}).status_code == 200
    assert client.post("/__aibind__/complete", json={"input": "x" * 100}).status_code == 413


def test_plain_text_source_runs_in_application_context_to_its_end(app, dsn, tables):
    torn_down = []

    @app.teardown_appcontext
    def tear_down(error):
        if "user" in g:
            torn_down.append(g.user)

    def use(generation):
        g.user = "source"
        for _ in range(3):
            yield f"{g.user} in {current_app.name} "

    with PostgresStreamStore(dsn, **tables) as store:
        app.register_blueprint(blueprint(StreamHandler(use, store=store, prefix="/ai")))
        response = app.test_client().post("/ai/complete", json={"input": "hi"})
        assert response.data == b"source in shop " * 3
        until(lambda: torn_down == ["source"])


def test_refusals_reach_the_error_handlers_of_the_application(app, dsn, tables):
    @app.errorhandler(401)
    def unauthorized(error):
        return "log in first", 401

    def refuse(*arguments):
        if request.json.get("redirect"):
            abort(redirect("/login"))
        abort(401)

    with PostgresStreamStore(dsn, **tables) as store:
        app.register_blueprint(blueprint(StreamHandler(refuse, store=store, prefix="/ai")))
        app.register_blueprint(blueprint(StreamHandler(generate, store=store, prefix="/checked", authorize=refuse)))
        client = app.test_client()
        for prefix in ("/ai", "/checked"):
            response = client.post(f"{prefix}/stream", json={"prompt": "x", "sessionId": "a"})
            assert (response.status_code, response.data) == (401, b"log in first")
            response = client.post(f"{prefix}/stream", json={"prompt": "x", "sessionId": "a", "redirect": True})
            assert (response.status_code, response.location) == (302, "/login")


def test_application_context_of_source_is_torn_down_at_its_end(app, dsn, tables):
    events, request_ended = [], Event()

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
        assert request_ended.wait(20)
        own = resource()
        yield "a"
        assert resource() is own
        yield "b"
        events.append("the end")

    with PostgresStreamStore(dsn, **tables) as store:
        app.register_blueprint(blueprint(StreamHandler(use, store=store, prefix="/ai")))
        app.before_request(lambda: resource() and None)
        response = app.test_client().post("/ai/stream", json={"prompt": "hi"})
        assert events == ["up", "down"]
        request_ended.set()
        assert b"event: done" in response.data
        until(lambda: events == ["up", "down", "up", "the end", "down"])


def test_async_handler_raises():
    with pytest.raises(TypeError, match="Flask takes a synchronous handler, not AsyncStreamHandler"):
        blueprint(AsyncStreamHandler(generate, store=AsyncPostgresStreamStore("")))
