"""A chat with `useChat` of the AI SDK, in Flask. Run these commands in this folder.

npm install && npm run build
pip install 'aibind-postgres[binary,cli,flask]' gunicorn
export DATABASE_URL=postgresql://…
aibind-postgres migrate && gunicorn --threads 100 flask_app:app
"""

import os
import time
from collections.abc import Iterator

from flask import Flask, Response

from aibind_postgres import AiSdkHandler, Generation, PostgresConversationStore, PostgresStreamStore
from aibind_postgres.contrib.flask import blueprint

store = PostgresStreamStore(os.environ["DATABASE_URL"])
conversations = PostgresConversationStore(os.environ["DATABASE_URL"], ttl=None)


def generate(generation: Generation) -> Iterator[str]:
    for word in f"You asked: {generation.prompt}".split():  # replace this with your model
        yield f"{word} "
        time.sleep(0.1)


# With `public`, the id of a chat suffices to read it. With a login, pass `owner` instead.
handler = AiSdkHandler(generate, store=store, conversations=conversations, public=True)
app = Flask(__name__, static_folder="dist", static_url_path="")
app.register_blueprint(blueprint(handler))


@app.get("/")
def page() -> Response:
    return app.send_static_file("index.html")
