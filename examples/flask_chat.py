"""A chat in Flask. Its answers survive a reload of the page, a lost connection, and a browser that disconnects.

If the web server is restarted, the text so far is kept.

pip install 'aibind-postgres[binary,flask]' gunicorn
DATABASE_URL=postgresql://… gunicorn --chdir examples --threads 100 flask_chat:app

Each reader occupies a thread, so start more threads than readers.
"""

import os

from flask import Flask, Response, abort, request
from shared import DAY, browser_cookie, browser_of, page_file
from shared.model import generate

from aibind_postgres import (
    Housekeeper,
    PostgresConversationStore,
    PostgresStreamStore,
    StreamHandler,
    WebRequest,
    schema,
)
from aibind_postgres.contrib.flask import blueprint

DSN = os.environ["DATABASE_URL"]
schema.migrate(DSN)  # in production, run this when you deploy
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
Housekeeper(store, conversations).start()  # with `gunicorn --preload`, in its hook post_fork


def owner(request: WebRequest) -> str | None:
    return browser_of(request.original.cookies)


app = Flask(__name__)
app.register_blueprint(blueprint(StreamHandler(generate, store=store, conversations=conversations, owner=owner)))


@app.get("/")
def page() -> Response:
    response = file("index.html")
    response.set_cookie(**browser_cookie(request.cookies))
    return response


@app.get("/page/<path:name>")
def file(name: str) -> Response:
    try:
        content, headers = page_file(name)
    except LookupError:
        abort(404)
    return Response(content, headers=headers)
