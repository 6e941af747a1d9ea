"""A Starlette application with traces.

POST /stream starts an answer, GET /stream/{id} follows it, and GET /spans returns the spans of this process.

Run with uvicorn. It takes DATABASE_URL, and stands for one process of an application.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore
from aibind_postgres.contrib.opentelemetry import OpenTelemetryMetrics

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("application")
store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"], metrics=OpenTelemetryMetrics())


class RequestSpans:
    """Puts each request into a span, as the instrumentation of a framework does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/spans":
            await self._app(scope, receive, send)
            return
        with tracer.start_as_current_span(f"{scope['method']} request"):
            await self._app(scope, receive, send)


async def answer() -> AsyncIterator[str]:
    for word in ("one ", "two ", "three"):
        with tracer.start_as_current_span("model"):
            await asyncio.sleep(0.05)
        yield word


async def start(request: Request) -> StreamingResponse:
    stream = await AsyncDurableStream.start(store, answer(), id=request.query_params["id"])
    return StreamingResponse(stream.sse(), headers=dict(stream.headers))


async def follow(request: Request) -> StreamingResponse:
    stream = await AsyncDurableStream.resume(store, request.path_params["id"])
    return StreamingResponse(stream.sse(), headers=dict(stream.headers))


async def spans(request: Request) -> JSONResponse:
    return JSONResponse(
        [
            {
                "name": span.name,
                "trace": span.context.trace_id,
                "id": span.context.span_id,
                "parent": None if span.parent is None else span.parent.span_id,
                "links": [link.context.span_id for link in span.links],
                "times": [span.start_time, span.end_time],
            }
            for span in exporter.get_finished_spans()
        ]
    )


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with store:
        yield


app = RequestSpans(
    Starlette(
        routes=[
            Route("/stream", start, methods=["POST"]),
            Route("/stream/{id}", follow),
            Route("/spans", spans),
        ],
        lifespan=lifespan,
    )
)
