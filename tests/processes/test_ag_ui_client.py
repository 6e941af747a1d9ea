"""The published client of AG-UI, with its verifier, on real servers with two processes."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from urllib.request import urlopen

import pytest
from support import npm, webapps

pytest.importorskip("ag_ui.core")

SCRIPT = Path(__file__).parents[1] / "npm" / "ag_ui_client.mjs"

TEXT = ["TEXT_MESSAGE_START", *["TEXT_MESSAGE_CONTENT"] * 6, "TEXT_MESSAGE_END"]
SENTENCE = "The sky above us is blue"


@pytest.fixture(scope="module", params=["flask", "fastapi"])
def web(request, web_database):
    npm.install("ag_ui")  # skips
    with webapps.running(request.param, web_database, module="ag_ui_apps") as client:
        yield client


@pytest.fixture(scope="module")
def asgi(web_database):
    pytest.importorskip("pydantic_ai")
    npm.install("ag_ui")
    with webapps.running("fastapi", web_database, module="ag_ui_apps") as client:
        yield client


def play(web, scenario, prompt="", *, warns=False):
    """Run a scenario of the script. Return its results, and the id of the run."""
    run_id = f"run/{uuid.uuid4()}"
    order = json.dumps({"scenario": scenario, "prompt": prompt, "runId": run_id})
    output = json.loads(npm.run_node("ag_ui", SCRIPT, order, f"http://127.0.0.1:{web.port}/agent"))
    assert bool(output["warnings"]) == warns, output["warnings"]
    return *output["clients"], run_id


def types(client):
    return [event["type"] for event in client["events"]]


def text_of(client):
    """Return the text of the last message."""
    return client["messages"][-1]["content"]


def test_version():
    assert npm.version("ag_ui", "@ag-ui/client") == "1.0.0"


def test_replay_by_a_second_client_half_way(web):
    first, second, third, run_id = play(web, "follow", f"slowly {SENTENCE}")
    ids = {"threadId": "thread", "runId": run_id}
    assert types(first) == ["RUN_STARTED", *TEXT, "RUN_FINISHED"]
    assert first["events"][0] == {"type": "RUN_STARTED", **ids, "protocolVersion": "1.0"}
    assert first["events"][-1] == {"type": "RUN_FINISHED", **ids}
    assert text_of(first) == f"{SENTENCE} "
    assert first == second == third
    assert (first["failed"], first["error"]) == (None, None)


def test_every_form_and_kind_of_event(web):
    first, second, third, _ = play(web, "follow", f"everything {SENTENCE}")
    assert first == second == third
    assert (first["failed"], first["error"]) == (None, None)
    assert first["events"][0]["threadId"] == first["events"][-1]["threadId"] == "own thread"
    assert first["state"] == {"colour": None, "size": 1}
    contents = [message.get("content") for message in first["messages"]]
    assert contents[1:] == ["hm", None, "blue", "Grüß\r\ndich \U0001f642\0", {"step": 2}, f"{SENTENCE} "]
    assert {"type": "CUSTOM", "name": "n", "value": {"a": None}} in first["events"]


def test_stop_from_another_client_closes_what_is_open(web):
    first, second, answer, run_id = play(web, "stop", f"wait {SENTENCE}")
    assert answer == [200, {"ok": True}]
    assert first == second
    assert (first["failed"], first["error"]) == (None, None)
    assert types(first)[-8:] == [
        "TEXT_MESSAGE_END",
        "TOOL_CALL_END",
        "REASONING_MESSAGE_END",
        "REASONING_END",
        "STEP_FINISHED",
        "SUBAGENT_ERROR",
        "STEP_FINISHED",
        "RUN_FINISHED",
    ]
    assert first["events"][-1]["outcome"] == {"type": "cancelled"}
    assert first["events"][-1]["runId"] == run_id
    assert text_of(first) == f"{SENTENCE} "


def test_error(web):
    first, second, third, _ = play(web, "follow", f"fail {SENTENCE}")
    assert types(first) == ["RUN_STARTED", *TEXT[:-1], "RUN_ERROR"]
    assert first["error"] == "the answer was interrupted"
    assert first == second == third
    first, *_ = play(web, "follow", "fail-first")
    assert types(first) == ["RUN_STARTED", "RUN_ERROR"]


def test_run_continues_without_its_client(web):
    first, second, _ = play(web, "leave", f"slower {SENTENCE}")
    assert "RUN_FINISHED" not in types(first)
    assert types(second) == ["RUN_STARTED", *TEXT, "RUN_FINISHED"]
    assert text_of(second) == f"{SENTENCE} "


def test_repeated_request_replays_the_run(web):
    first, second, _ = play(web, "repeat", f"slowly {SENTENCE}")
    assert first == second
    assert text_of(second) == f"{SENTENCE} "


def test_two_runs_of_a_thread(web):
    client, _ = play(web, "thread", f"quickly {SENTENCE}")
    assert [message["role"] for message in client["messages"]] == ["user", "assistant"] * 2
    assert (client["failed"], client["error"]) == (None, None)


def test_missing_run_and_invalid_input(web):
    client, stopped, _ = play(web, "missing")
    assert client["events"] == []
    assert client["failed"].startswith("Error: HTTP 404: ")
    assert stopped[0] == 404
    status, answer, _ = play(web, "invalid")
    assert (status, answer) == (400, {"error": "runId is required"})


@pytest.mark.parametrize("form", ["events", "encoded"])
def test_pydantic_ai(asgi, form):
    first, second, third, run_id = play(asgi, "follow", f"pydantic-ai {form}")
    assert first == second == third
    assert (first["failed"], first["error"]) == (None, None)
    assert first["events"][0]["runId"] == first["events"][-1]["runId"] == run_id
    assert types(first).count("RUN_STARTED") == types(first).count("RUN_FINISHED") == 1
    assert {"REASONING_START", "TOOL_CALL_START", "TOOL_CALL_RESULT"} <= {*types(first)}
    assert text_of(first) == "The sky is blue"
    assert [message["role"] for message in first["messages"]] == ["user", "reasoning", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("form", ["events", "encoded"])
def test_stop_of_pydantic_ai(asgi, form):
    first, second, _, _ = play(asgi, "stop", f"pydantic-ai {form} for ever")
    assert first == second
    assert (first["failed"], first["error"]) == (None, None)
    assert first["events"][-1]["outcome"] == {"type": "cancelled"}
    assert text_of(first).startswith("The sky ")


@pytest.mark.parametrize("framework", ["starlette", "django, asgi", "django, wsgi"])
def test_other_frameworks(web_database, framework):
    npm.install("ag_ui")
    with webapps.running(framework, web_database, module="ag_ui_apps") as web:
        first, second, third, _ = play(web, "follow", f"slowly {SENTENCE}")
        assert first == second == third
        assert types(first) == ["RUN_STARTED", *TEXT, "RUN_FINISHED"]
        assert play(web, "stop", f"wait {SENTENCE}")[2] == [200, {"ok": True}]


def test_openapi_schema(asgi):
    with urlopen(f"http://127.0.0.1:{asgi.port}/openapi.json", timeout=30) as response:
        paths = json.load(response)["paths"]
    assert {path: {*methods} for path, methods in paths.items()} == {
        "/agent": {"post"},
        "/agent/{id}": {"get"},
        "/agent/{id}/stop": {"post"},
    }
    body = paths["/agent"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["threadId", "runId", "messages"]
