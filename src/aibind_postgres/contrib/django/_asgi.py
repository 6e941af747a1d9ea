"""The shutdown of an ASGI server, which Django does not handle."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ._stores import close_async_stores

Application = Callable[[Any, Any, Any], Awaitable[None]]


def with_lifespan(application: Application, timeout: float = 5.0) -> Application:
    """Return an ASGI application that closes the asynchronous stores when the server shuts down.

    Without it, answers that are running at this time end only when their leases have expired.

    Args:
        application: The application of `get_asgi_application`.
        timeout: Seconds to wait for running answers. The remaining ones then end in state error. Default: 5.

    Returns:
        The application for the server.

    Example:
        application = with_lifespan(get_asgi_application())
    """

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await application(scope, receive, send)
            return
        await receive()  # startup
        await send({"type": "lifespan.startup.complete"})
        await receive()  # shutdown
        await close_async_stores(timeout)
        await send({"type": "lifespan.shutdown.complete"})

    return handle
