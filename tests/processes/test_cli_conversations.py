"""The commands `conversations list`, `show`, `export` and `delete`, run in separate processes."""

from __future__ import annotations

import json

import psycopg
import pytest
from support import servers
from support.exports import HOSTILE, METADATA, create_samples, run
from support.terminal import terminal

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore


@pytest.fixture
def target(server, template):
    """The database to import into."""
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture
def conversations(database):
    with PostgresConversationStore(database) as conversations:
        yield conversations


@pytest.fixture
def streams(database):
    with PostgresStreamStore(database) as streams:
        yield streams


def message(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


# list


def test_list(database, conversations, streams):
    conversations.save("a", ChatHistory(), owner="ann")
    conversations.describe("a", title="Colours \x1b[31m" + "x" * 100)
    conversations.save("b", ChatHistory(), owner="ben")
    streams.create("answer", session_id="b", owner="ben")
    lines = run("conversations", "list", dsn=database).stdout.decode().splitlines()
    assert [line.split()[:2] for line in lines] == [["ID", "OWNER"], ["b", "ben"], ["a", "ann"]]
    assert lines[1].endswith(" answer")
    assert "\\x1b[31m" in lines[2]
    assert "…" in lines[2]
    assert max(map(len, lines)) < 100
    of_ann = run("conversations", "list", "--owner", "ann", "--json", dsn=database).stdout
    [entry] = map(json.loads, of_ann.splitlines())
    assert (entry["session_id"], entry["owner"], entry["title"][:7]) == ("a", "ann", "Colours")
    assert b"\x1b" not in of_ann


def test_list_without_conversations(database):
    assert run("conversations", "list", dsn=database).stdout.split() == [
        b"ID",
        b"OWNER",
        b"TITLE",
        b"SAVED",
        b"RUNNING",
    ]
    assert run("conversations", "list", "--json", dsn=database).stdout == b""


# show


def test_show_marks_the_active_branch(database, conversations):
    chat: ChatHistory[dict[str, str]] = ChatHistory()
    chat.append(message("Name a colour."))
    first = chat.append(message("Red.\nOr blue.", "assistant"))
    chat.append(message("Another one."))
    chat.regenerate(first, message("\x1b[31mGreen" + "!" * 200, "assistant"))
    conversations.save("a", chat, owner="ann")
    conversations.describe("a", metadata={"n": 1})
    head, _, tree = run("conversations", "show", "a", dsn=database).stdout.decode().partition("\n\n")
    assert tree.splitlines() == [
        "* user: Name a colour.",
        r"    assistant: Red.\nOr blue.",
        "    user: Another one.",
        r"*   assistant: \x1b[31mGreen" + "!" * 75 + "…",
    ]
    assert "owner:     ann" in head
    assert 'metadata:  {"n": 1}' in head
    assert "messages:  4, of which 2 on the current path" in head
    document = json.loads(run("conversations", "show", "a", "--json", dsn=database).stdout)
    assert (document["session_id"], document["document"]) == ("a", json.loads(chat.to_json()))


def test_show_without_a_conversation(database):
    for command in (["show", "a"], ["show", "a", "--json"], ["delete", "a", "--yes"], ["export", "a", "-"]):
        done = run("conversations", *command, dsn=database, code=3)
        assert b"conversation 'a' not found" in done.stderr


def test_show_a_row_that_is_no_conversation(database):
    with psycopg.connect(database) as admin:
        admin.execute("INSERT INTO aibind_conversations (session_id, data, expires_at) VALUES ('a', 'x', 9e15)")
    done = run("conversations", "show", "a", dsn=database, code=1)
    assert b"conversation 'a' cannot be shown: invalid conversation document: it is not JSON" in done.stderr


# export


def test_export_by_owner_and_id(database, conversations):
    for name in ("a", "b", "c"):
        conversations.save(name, ChatHistory(), owner="ann" if name < "c" else "ben")
    with psycopg.connect(database) as admin:
        admin.execute("UPDATE aibind_conversations SET expires_at = 0 WHERE session_id = 'b'")

    def ids(*arguments: str) -> list[str]:
        lines = map(json.loads, run("conversations", "export", *arguments, "-", dsn=database).stdout.splitlines())
        return [line["session_id"] for line in lines if line["type"] == "conversation"]

    assert ids("--all") == ["a", "c"]
    assert ids("--owner", "ann") == ["a"]
    assert ids("c") == ["c"]
    for arguments in (["-"], ["a", "--all", "-"], ["a", "b", "-"]):
        run("conversations", "export", *arguments, dsn=database, code=2)


def test_empty_owner_does_not_select_all(database, conversations, tmp_path):
    conversations.save("a", ChatHistory(), owner="ann")
    for command in (["conversations", "export"], ["export"]):
        done = run(*command, "--owner", "", tmp_path / "x", dsn=database, code=2)
        assert b"--owner must not be empty" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_table_names_migrate(empty_database, tmp_path):
    for command in (["list"], ["show", "a"], ["export", "--all", str(tmp_path / "x")]):
        assert b"migrate" in run("conversations", *command, dsn=empty_database, code=1).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["x.jsonl", "x.jsonl.gz"])
def test_round_trip(database, target, tmp_path, file):
    create_samples(database)
    path = tmp_path / file
    run("conversations", "export", "--all", path, dsn=database)
    done = run("import", path, "--json", dsn=target)
    assert json.loads(done.stdout) == {"streams": 0, "chunks": 0, "conversations": len(HOSTILE), "skipped": 0}
    again = tmp_path / f"again-{file}"
    run("conversations", "export", "--all", again, dsn=target)
    assert again.read_bytes() == path.read_bytes()
    with psycopg.connect(target) as admin:
        exact = admin.execute("SELECT count(*) FROM aibind_conversations WHERE metadata = %s::jsonb", [METADATA])
        assert exact.fetchone() == (len(HOSTILE),)
    with PostgresConversationStore(database) as old, PostgresConversationStore(target) as new:
        for text in HOSTILE:
            assert new.load(f"chat {text}").to_json() == old.load(f"chat {text}").to_json()
    refused = run("import", path, dsn=target, code=2)
    assert b"these conversations exist: 'chat " in refused.stderr
    assert b"--resume" in refused.stderr
    assert json.loads(run("import", path, "--resume", "--json", dsn=target).stdout)["skipped"] == len(HOSTILE)
    with PostgresConversationStore(target) as new, new.edit(f"chat {HOSTILE[0]}") as chat:
        chat.append("changed")
    assert b"exist and differ" in run("import", path, "--resume", dsn=target, code=2).stderr


# delete


def test_delete_with_its_streams(database, conversations, streams):
    conversations.save("a", ChatHistory(), owner="ann")
    conversations.save("b", ChatHistory(), owner="ann")
    streams.create("of ann", session_id="a", owner="ann")
    streams.create("of nobody", session_id="a")
    streams.create("of ben", session_id="a", owner="ben")
    streams.create("of b", session_id="b", owner="ann")
    refused = run("conversations", "delete", "a", dsn=database, code=2)
    assert b"--yes" in refused.stderr
    assert conversations.get_info("a") is not None
    done = run("conversations", "delete", "a", "--yes", "--json", dsn=database)
    assert json.loads(done.stdout) == {"conversations": 1, "streams": 2}
    assert conversations.get_info("a") is None
    assert conversations.get_info("b") is not None
    assert sorted(info.id for info in streams.list()) == ["of b", "of ben"]


@pytest.mark.parametrize(("answer", "code", "remains"), [("y", 0, False), ("n", 1, True), ("", 1, True)])
def test_delete_asks(database, conversations, answer, code, remains):
    conversations.save("a", ChatHistory(), owner="ann")
    conversations.describe("a", title="Colours")
    with terminal("conversations", "delete", "a", dsn=database) as running:
        running.read_until("[y/N]")
        assert "Delete conversation 'a' of owner 'ann', titled 'Colours'" in running.output
        running.send(f"{answer}\n")
        running.read_rest()
    assert running.returncode == code
    assert (conversations.get_info("a") is not None) == remains
