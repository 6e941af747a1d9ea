"""The commands that list, show, end and delete streams, and event streams on the command line, run as processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from support.command_line import in_parallel, run, start
from support.concurrency import until
from support.terminal import run_on_terminal, terminal

from aibind_postgres import ChatHistory, DurableStream, PostgresConversationStore, PostgresStreamStore, StreamEvent


@pytest.fixture
def store(database: str) -> Iterator[PostgresStreamStore]:
    with PostgresStreamStore(database) as store:
        yield store


@pytest.fixture
def conversations(database: str) -> Iterator[PostgresConversationStore]:
    with PostgresConversationStore(database) as conversations:
        yield conversations


@pytest.fixture
def streams(store: PostgresStreamStore) -> PostgresStreamStore:
    """A store with four streams."""
    store.create("a", session_id="chat", owner="ann")
    store.append_many("a", ["x", "y"])
    store.create("b", owner="bob", metadata={"n": 1}, ttl=60)
    store.complete("b")
    store.create("c", owner="ann")
    store.fail("c", "the model\nis tired")
    store.create("d\x1b[31m\n")
    store.stop("d\x1b[31m\n")
    return store


# list and show


def test_list_in_a_pipe_has_plain_columns(database: str, streams: PostgresStreamStore) -> None:
    done = run("list", dsn=database, FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert lines == [line.rstrip() for line in lines]  # unlike those of the table for terminals
    rows = [line.split() for line in lines]
    assert rows[0] == ["ID", "STATE", "CHUNKS", "AGE", "SESSION", "OWNER"]
    assert [row[:3] + row[4:] for row in rows[1:]] == [
        ["a", "active", "2", "chat", "ann"],
        ["b", "done", "0", "-", "bob"],
        ["c", "error", "0", "-", "ann"],
        ["d\\x1b[31m\\n", "stopped", "0", "-", "-"],
    ]
    empty = run("list", "--state", "active", "--owner", "bob", dsn=database)
    assert empty.stdout == b"ID  STATE  CHUNKS  AGE  SESSION  OWNER\n"


def test_list_as_json_with_filters(database: str, streams: PostgresStreamStore) -> None:
    filters = {
        (): ["a", "b", "c", "d\x1b[31m\n"],
        ("--state", "error"): ["c"],
        ("--owner", "ann"): ["a", "c"],
        ("--session", "chat"): ["a"],
        ("--owner", "ann", "--state", "active"): ["a"],
        ("--session", "other"): [],
    }
    listed = in_parallel(["list", "--json", *options] for options in filters)(dsn=database)
    for done, ids in zip(listed, filters.values(), strict=True):
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ids


def test_list_of_many_streams(database: str, store: PostgresStreamStore) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO aibind_stream_status (id, state, expires_at) SELECT n, 'done', 0 FROM generate_series(1, 2500)"
            " AS n"
        )
    lines = run("list", dsn=database).stdout.splitlines()
    assert len(lines) == 2501
    assert sum(line.startswith(b"ID ") for line in lines) == 1


def test_list_on_a_terminal_is_a_table(database: str, streams: PostgresStreamStore) -> None:
    code, output = run_on_terminal("list", dsn=database)
    assert code == 0
    assert "\x1b[" in output
    assert "\x1b[31m\r\n" not in output  # of the id
    code, output = run_on_terminal("list", dsn=database, NO_COLOR="1")
    assert (code, "\x1b" in output) == (0, False)
    assert output.split()[:6] == ["ID", "STATE", "CHUNKS", "AGE", "SESSION", "OWNER"]
    streams.create("y" * 150)
    _, output = run_on_terminal("list", dsn=database, NO_COLOR="1", COLUMNS="60")
    assert output.count("y") == 150  # a long id is folded, not shortened


def test_list_watch(database: str, store: PostgresStreamStore) -> None:
    store.create("first")
    with start("list", "--watch", "--json", dsn=database) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["id"] == "first"
        store.create("a second one")
        until(lambda: json.loads(watcher.stdout.readline())["id"] == "a second one")
        watcher.send_signal(signal.SIGINT)
        assert b"Traceback" not in watcher.communicate()[1]
    assert watcher.returncode == 130


def test_list_watch_on_a_terminal(database: str, store: PostgresStreamStore) -> None:
    store.create("first")
    with terminal("list", "--watch", dsn=database) as watcher:
        watcher.read_until("first")
        store.create("second")
        watcher.read_until("second")
        watcher.send("\x03")  # Ctrl-C
        output = watcher.read_rest()
    assert watcher.returncode == 130
    assert "\x1b[?1049l" in output  # the screen is restored
    assert "Traceback" not in output


def test_show(database: str, streams: PostgresStreamStore) -> None:
    commands = [["show", id] for id in ("a", "b", "c", "d\x1b[31m\n")]
    shown = in_parallel(commands)(dsn=database)
    assert [done.returncode for done in shown] == [0, 0, 1, 1]
    lines = [dict(line.split(":", 1) for line in done.stdout.decode().splitlines()) for done in shown]
    values = [{name: value.strip() for name, value in fields.items()} for fields in lines]
    assert values[0]["session id"] == "chat"
    assert values[0]["total chunks"] == "2"
    assert values[0]["error"] == "-"
    assert values[1]["metadata"] == '{"n": 1}'
    assert values[1]["ttl"] == "60.0 seconds"
    assert values[2]["error"] == "the model\\nis tired"
    assert values[3]["id"] == "d\\x1b[31m\\n"


def test_show_as_json(database: str, streams: PostgresStreamStore) -> None:
    done = run("show", "c", "--json", dsn=database)
    shown = json.loads(done.stdout)
    info = streams.get_info("c")
    assert info is not None
    assert info.created_at is not None
    assert done.returncode == 1
    assert list(shown) == list(info._fields)
    assert (shown["error"], shown["owner"]) == ("the model\nis tired", "ann")
    assert shown["created_at"] == info.created_at.isoformat()


# stop and fail


def test_stop_and_fail(database: str, streams: PostgresStreamStore) -> None:
    streams.create("e")
    assert run("stop", "a", dsn=database).returncode == 0
    done = run("fail", "e", "--error", "no \U0001f642 money", "--json", dsn=database)
    assert json.loads(done.stdout) == {"id": "e", "state": "error", "error": "no \U0001f642 money", "total_chunks": 0}
    assert done.returncode == 0
    assert streams.get_status("a") == ("stopped", None, 2)
    assert streams.get_status("e") == ("error", "no \U0001f642 money", 0)
    stopped = b'{"id": "a", "state": "stopped", "error": null, "total_chunks": 2}\n'
    again = in_parallel([["stop", "e"], ["fail", "a"], ["stop", "a", "--json"]])(dsn=database)
    assert [done.stdout for done in again] == [b"", b"", stopped]
    for done in again:
        assert done.returncode == 1
        assert b"had already ended: its state is" in done.stderr
    assert [done.returncode for done in in_parallel([["stop", "?"], ["fail", "?"]])(dsn=database)] == [3, 3]


# delete


def test_delete_of_a_stream(database: str, streams: PostgresStreamStore) -> None:
    refused = run("delete", "a", dsn=database)
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert b"give --yes" in refused.stderr
    assert streams.get_status("a") is not None
    done = run("delete", "a", "--yes", "--json", dsn=database)
    assert (json.loads(done.stdout), done.returncode) == ({"conversations": 0, "streams": 1}, 0)
    assert streams.get_status("a") is None
    assert run("delete", "a", "--yes", dsn=database).returncode == 3


def test_delete_asks_on_a_terminal(database: str, streams: PostgresStreamStore) -> None:
    for answer, code in (("n\n", 1), ("\n", 1), ("\x04", 1), ("\x03", 130), ("yes\n", 0)):
        assert streams.get_status("a") is not None
        with terminal("delete", "a", dsn=database) as asked:
            asked.read_until("Delete stream 'a' with 2 chunks? Its state is 'active'. [y/N]")
            asked.send(answer)
            assert "Traceback" not in asked.read_rest()
        assert asked.returncode == code
    assert streams.get_status("a") is None
    code, output = run_on_terminal("delete", "a", dsn=database)
    assert (code, "not found" in output) == (3, True)


def test_delete_of_an_owner(
    database: str, streams: PostgresStreamStore, conversations: PostgresConversationStore
) -> None:
    conversations.save("chat of ann", ChatHistory(), owner="ann")
    streams.create("of the chat", session_id="chat of ann")
    with terminal("delete", "--owner", "ann", dsn=database) as asked:
        asked.read_until("Delete all conversations and streams of owner 'ann'? [y/N]")
        asked.send("n\n")
        asked.read_rest()
    assert asked.returncode == 1
    done = run("delete", "--owner", "ann", "--yes", dsn=database)
    assert (done.stdout, done.returncode) == (b"deleted streams: 3, conversations: 1\n", 0)
    assert [info.id for info in streams.list()] == ["b", "d\x1b[31m\n"]
    assert list(conversations.list()) == []


# Event streams


@pytest.mark.parametrize("wire", ["aibind", "ai_sdk"])
@pytest.mark.parametrize("command", [["tail"], ["replay", "--instant"], ["replay", "--speed", "1000"]])
def test_sse_is_that_of_a_browser(database: str, store: PostgresStreamStore, wire: str, command: list[str]) -> None:
    sources = {
        "aibind": ["Hel\r", "\nlo", StreamEvent("usage", "{}"), "\n"],
        "ai_sdk": ["Hel", {"type": "data-x", "data": 1}, "lo"],
    }
    stream = DurableStream.start(store, sources[wire], id="x", wire=wire)  # type: ignore[arg-type]  # a name of a wire
    stream.wait(30)
    total = 1 + max(chunk.seq for chunk in store.read_from("x"))
    afters = [*range(total)]
    printed = in_parallel([*command, "x", "--sse", "--after", str(after)] for after in afters)(dsn=database)
    for after, done in zip(afters, printed, strict=True):
        assert done.stdout == b"".join(DurableStream.resume(store, "x", after).sse())
        assert (done.stderr, done.returncode) == (b"", 0)


def test_sse_of_a_stream_that_failed(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    assert run("replay", "x", "--sse", dsn=database).stdout == b""  # active: there is no end yet
    store.fail("x", "no\nmoney")
    for done in in_parallel([["tail", "x", "--sse"], ["replay", "x", "--sse"]])(dsn=database):
        assert (done.stdout, done.returncode) == (b"".join(DurableStream.resume(store, "x").sse()), 1)
        assert b"event: error" in done.stdout


# Errors


def test_errors_name_the_database(empty_database: str) -> None:
    name = str(conninfo_to_dict(empty_database)["dbname"])
    commands = [["list"], ["show", "x"], ["stop", "x"], ["delete", "x", "--yes"], ["tail", "x"], ["cleanup"]]
    for done in in_parallel(commands)(dsn=empty_database):
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"aibind-postgres migrate" in done.stderr
        assert f"database {name})".encode() in done.stderr
        assert done.stderr.count(b"\n") == 1
