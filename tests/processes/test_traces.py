"""A trace from the request through the producer to the end of the stream, with readers in two server processes."""

from __future__ import annotations

import json
import urllib.request

from support.applications import serving

COMMAND = "uvicorn support.traced_app:app --port={port}"


def call(base, path, data=None):
    with urllib.request.urlopen(f"{base}{path}", data=data, timeout=30) as response:
        return response.read()


def spans(base):
    return json.loads(call(base, "/spans"))


def named(found, name):
    return [span for span in found if span["name"] == name]


def test_trace_of_an_answer_and_its_readers(database):
    with serving(COMMAND, database) as first, serving(COMMAND, database) as second:
        assert b"three" in call(first, "/stream?id=answer", b"")
        assert b"three" in call(first, "/stream/answer")
        assert b"three" in call(second, "/stream/answer")
        of_first, of_second = spans(first), spans(second)
    [request] = named(of_first, "POST request")
    [produced] = named(of_first, "aibind.produce")
    assert produced["parent"] == request["id"]
    models = named(of_first, "model")
    assert [span["parent"] for span in models] == [produced["id"]] * 3
    assert all(span["trace"] == request["trace"] for span in [produced, *models])
    assert produced["times"][0] <= models[0]["times"][0]
    assert produced["times"][1] >= models[-1]["times"][1]
    own, resumed = named(of_first, "aibind.read")
    assert own["parent"] == request["id"]
    assert resumed["parent"] == named(of_first, "GET request")[0]["id"]
    [elsewhere] = named(of_second, "aibind.read")
    assert elsewhere["parent"] == named(of_second, "GET request")[0]["id"]
    assert elsewhere["trace"] != request["trace"]
    assert [span["links"] for span in (own, resumed, elsewhere)] == [[produced["id"]]] * 3
