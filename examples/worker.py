"""Write answers in worker processes, so that the answers survive a restart of the web server.

pip install 'aibind-postgres[binary,cli,flask]' gunicorn; export DATABASE_URL=postgresql://…
aibind-postgres migrate && gunicorn --chdir examples --threads 100 worker:app

The web process starts `python worker.py ID` for each answer. With a task queue, send it the id: see celery_worker.py.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from flask import Flask, abort, request

from aibind_postgres import AibindError, DurableStream, PostgresStreamStore, StreamHandler
from aibind_postgres.contrib.flask import blueprint

store = PostgresStreamStore(os.environ["DATABASE_URL"])
app = Flask(__name__)


def user(_: object = None) -> str:
    return request.headers.get("X-Forwarded-User") or abort(401)  # set by your proxy, which authenticates users


# For /__aibind__/stream/resume and /stop, with an id. Answers start at /ask.
app.register_blueprint(blueprint(StreamHandler(lambda _: abort(404), store=store, owner=user)))


@app.post("/ask/<session>")
def ask(session: str) -> dict[str, str]:
    if running := store.active(session):  # one answer at a time
        return {"id": running.id} if running.owner == user() else abort(404)
    prompt = {"prompt": request.get_json()["prompt"]}
    stream_id = store.create(session_id=session, owner=user(), metadata=prompt, lease=60)
    subprocess.Popen([sys.executable, __file__, stream_id])
    return {"id": stream_id}


def generate(prompt: str) -> Iterator[str]:
    for word in f"You have asked: {prompt}".split():  # replace this with your model
        yield f"{word} "
        time.sleep(0.1)


def work(stream_id: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by default, SIGTERM ends the process at once
    with store:
        if stream := store.get_info(stream_id):  # None if the user has deleted it
            print(DurableStream.produce(store, stream.id, generate(stream.metadata["prompt"]), idle_timeout=60).state)


if __name__ == "__main__":
    try:
        work(sys.argv[1])
    except AibindError as error:
        sys.exit(f"{error}")
