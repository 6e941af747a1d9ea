"""Recipes for worker processes: a plain process and Celery."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.applications import EXAMPLES, Browser, environment_of, serving
from support.applications import text_of as answer_of

from aibind_postgres import PostgresStreamStore
from aibind_postgres.models import event_of

WEB_SERVER = "gunicorn --chdir=examples --workers=2 --threads=20 --bind=127.0.0.1:{port} worker:app"
PROMPT = "why is the sky blue?"
ANSWER = "You have asked: why is the sky blue? "


@pytest.fixture
def store(database: str) -> Iterator[PostgresStreamStore]:
    with PostgresStreamStore(database) as store:
        yield store


@contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def worker(database: str, stream_id: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(EXAMPLES / "worker.py"), stream_id]
    with running(*command, env=environment_of(database)) as process:
        yield process


def text_of(store: PostgresStreamStore, stream_id: str) -> str:
    return "".join(event_of(chunk.data)[1] for chunk in store.read_from(stream_id))


def wait_for_text(store: PostgresStreamStore, stream_id: str) -> None:
    assert next(iter(store.read_from(stream_id))).seq == 1


def test_worker_process_writes_the_answer(database: str, store: PostgresStreamStore) -> None:
    stream_id = store.create(metadata={"prompt": PROMPT}, lease=60)
    with worker(database, stream_id) as process:
        assert text_of(store, stream_id) == ANSWER
        assert process.communicate(timeout=30)[0] == "done\n"
    assert store.get_status(stream_id).state == "done"


def test_sigterm_ends_the_stream_of_a_worker_process(database: str, store: PostgresStreamStore) -> None:
    stream_id = store.create(metadata={"prompt": "word " * 1000}, lease=60)
    with worker(database, stream_id) as process:
        wait_for_text(store, stream_id)
        process.send_signal(signal.SIGTERM)
        assert store.wait(stream_id, 10).state == "error"
        output, _ = process.communicate(timeout=30)
        assert (output, process.returncode) == ("terminated\n", 1)


def test_stopped_stream_is_not_written(database: str, store: PostgresStreamStore) -> None:
    stream_id = store.create(metadata={"prompt": PROMPT}, lease=60)
    store.stop(stream_id)
    with worker(database, stream_id) as process:
        output, _ = process.communicate(timeout=30)
        assert stream_id in output
        assert process.returncode == 1
    assert store.get_status(stream_id) == ("stopped", None, 0)


def test_worker_processes_outlive_the_web_server(database: str, store: PostgresStreamStore) -> None:
    prompt = "word " * 60
    with serving(WEB_SERVER, database) as url:
        ann, bob = Browser(url, **{"X-Forwarded-User": "ann"}), Browser(url, **{"X-Forwarded-User": "bob"})
        stream_id = ann.json("POST", "/ask/chat", {"prompt": prompt})["id"]
        wait_for_text(store, stream_id)
    running = store.active("chat")
    assert running is not None
    assert (running.id, running.owner, running.session_id) == (stream_id, "ann", "chat")
    with serving(WEB_SERVER, database) as url:
        ann, bob = Browser(url, **{"X-Forwarded-User": "ann"}), Browser(url, **{"X-Forwarded-User": "bob"})
        assert ann.json("POST", "/ask/chat", {"prompt": "again"}) == {"id": stream_id}  # it is still running
        assert bob.status("POST", "/ask/chat", {"prompt": "again"}) == 404
        assert bob.status("GET", f"/__aibind__/stream/resume?id={stream_id}") == 404
        assert Browser(url).status("POST", "/ask/chat", {"prompt": "again"}) == 401
        assert answer_of(ann.resume(stream_id)) == f"You have asked: {prompt}"
        assert store.active("chat") is None
        second = ann.json("POST", "/ask/chat", {"prompt": PROMPT})["id"]
        assert answer_of(ann.resume(second)) == ANSWER
    assert {stream.id for stream in store.list(session_id="chat", owner="ann", state="done")} == {stream_id, second}


def test_user_stops_the_answer_of_a_worker_process(database: str, store: PostgresStreamStore) -> None:
    with serving(WEB_SERVER, database) as url:
        ann, bob = Browser(url, **{"X-Forwarded-User": "ann"}), Browser(url, **{"X-Forwarded-User": "bob"})
        stream_id = ann.json("POST", "/ask/chat", {"prompt": "word " * 1000})["id"]
        wait_for_text(store, stream_id)
        assert bob.status("POST", "/__aibind__/stream/stop", {"id": stream_id}) == 404
        assert ann.status("POST", "/__aibind__/stream/stop", {"id": stream_id}) == 200
        assert store.get_status(stream_id).state == "stopped"


@pytest.fixture
def celery(database: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Celery worker with a broker in a folder. Its variables."""
    pytest.importorskip("celery")
    (tmp_path / "celeryconfig.py").write_text(
        "broker_transport_options = {'data_folder_in': 'queue', 'data_folder_out': 'queue', 'control_folder': 'queue'}"
    )
    (tmp_path / "queue").mkdir()
    (tmp_path / "worker.py").write_text(
        "import celeryconfig, celery_worker\n"
        "celery_worker.app.config_from_object(celeryconfig)\n"
        "app, ask = celery_worker.app, celery_worker.ask\n"
    )
    path = os.pathsep.join([str(tmp_path), str(EXAMPLES)])
    variables = {**os.environ, "DATABASE_URL": database, "BROKER_URL": "filesystem://", "PYTHONPATH": path}
    command = [
        sys.executable,
        "-m",
        "celery",
        "--app",
        "worker",
        "worker",
        "--concurrency",
        "2",
        "--loglevel",
        "WARNING",
    ]
    with running(*command, cwd=tmp_path, env=variables) as process:
        variables["folder"] = str(tmp_path)
        yield variables
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def ask(celery: dict[str, str], prompt: str) -> str:
    code = f"import worker; print(worker.ask({prompt!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=celery["folder"], env=celery, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_celery_worker_writes_the_answers(store: PostgresStreamStore, celery: dict[str, str]) -> None:
    streams = [ask(celery, PROMPT) for _ in range(3)]
    assert [text_of(store, stream_id) for stream_id in streams] == [ANSWER] * 3
    assert [store.get_status(stream_id).state for stream_id in streams] == ["done"] * 3
