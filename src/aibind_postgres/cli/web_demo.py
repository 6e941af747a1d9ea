"""`demo --web`: one of the chats in `examples/`, served by this process until it is interrupted."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from .target import FAILED, INTERRUPTED, USAGE, end

_PACKAGED = Path(__file__).parents[1] / "examples"  # in an installed package; in a checkout the folder is at the top
EXAMPLES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "examples"


def serve(dsn: str, framework: str, host: str, port: int) -> None:
    """Run a chat, which makes its tables if they are not there, and print its address."""
    os.environ.update(DATABASE_URL=dsn, DJANGO_SETTINGS_MODULE="django_chat.settings")
    sys.path.insert(0, str(EXAMPLES))
    module, name, run = _CHATS[framework]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Bound first, so that whoever reads the address can use it at once.
    with socket.create_server((host, port), family=family, backlog=2048) as listener:
        try:
            app = getattr(import_module(module), name)
            shown = f"[{host}]" if ":" in host else host
            print(f"The chat is at http://{shown}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
            run(app, listener)
        except ModuleNotFoundError as error:
            end(USAGE, f"{error}: pip install 'aibind-postgres[web]'")


def _run_asgi(app: Any, listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Those who read an answer are cut off, since they come again. Of each, uvicorn would complain.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    server.run([listener])
    if not server.started:
        end(FAILED, "the chat could not be started")


def _run_wsgi(app: Any, listener: socket.socket) -> None:
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    host, port = listener.getsockname()[:2]
    make_server(host, port, app, threaded=True, fd=listener.fileno()).serve_forever()
    raise typer.Exit(INTERRUPTED)  # by Ctrl-C, which werkzeug keeps to itself


_CHATS: dict[str, tuple[str, str, Callable[[Any, socket.socket], None]]] = {
    "fastapi": ("fastapi_chat", "app", _run_asgi),
    "flask": ("flask_chat", "app", _run_wsgi),
    "django": ("django_chat.wsgi", "application", _run_wsgi),
}
