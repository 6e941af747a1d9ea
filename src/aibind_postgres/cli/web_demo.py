"""`demo --web`: serves one of the chats in `examples/` until interrupted."""

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

from .target import FAILED, INTERRUPTED, USAGE, exit_with

_PACKAGED = Path(__file__).parents[1] / "examples"  # in an installed package; a checkout has the folder at its root
EXAMPLES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "examples"


def serve(dsn: str, framework: str, host: str, port: int) -> None:
    """Print the address of a chat and run it. The chat creates missing tables itself."""
    if not EXAMPLES.is_dir():
        exit_with(FAILED, "the chats are missing: `demo --web` needs the package in a folder, not in a zip file")
    os.environ.update(DATABASE_URL=dsn, DJANGO_SETTINGS_MODULE="django_chat.settings")
    sys.path.insert(0, str(EXAMPLES))
    module, name, run = _CHATS[framework]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The socket is bound before the address is printed, so that the address works at once.
    with socket.create_server((host, port), family=family, backlog=2048) as listener:
        try:
            app = getattr(import_module(module), name)
            shown = f"[{host}]" if ":" in host else host
            print(f"The chat is at http://{shown}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
            run(app, listener)
        except ModuleNotFoundError as error:
            exit_with(USAGE, f"{error}: pip install 'aibind-postgres[web]'")


def _run_asgi(app: Any, listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Readers are disconnected, since they reconnect by themselves. uvicorn logs an error for each.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=0))  # seconds
    server.run([listener])
    if not server.started:
        exit_with(FAILED, "the chat could not be started")


def _run_wsgi(app: Any, listener: socket.socket) -> None:
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    host, port = listener.getsockname()[:2]
    make_server(host, port, app, threaded=True, fd=listener.fileno()).serve_forever()
    raise typer.Exit(INTERRUPTED)  # werkzeug swallows KeyboardInterrupt


_CHATS: dict[str, tuple[str, str, Callable[[Any, socket.socket], None]]] = {
    "fastapi": ("fastapi_chat", "app", _run_asgi),
    "flask": ("flask_chat", "app", _run_wsgi),
    "django": ("django_chat.wsgi", "application", _run_wsgi),
}
