"""Durable, resumable token streams and branching conversations on the PostgreSQL you already run."""

from ._async.client import AsyncPostgresClient
from ._async.stream_store import AsyncPostgresStreamStore
from ._async.stream_writer import AsyncStreamWriter
from ._sync.client import PostgresClient
from ._sync.stream_store import PostgresStreamStore
from ._sync.stream_writer import StreamWriter
from .adapters import wrap_asyncpg, wrap_django, wrap_sqlalchemy
from .errors import (
    AibindError,
    InvalidDataError,
    SchemaError,
    SequenceConflictError,
    StoreClosedError,
    StreamExistsError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
)
from .models import CleanupResult, StreamChunk, StreamInfo, StreamState, StreamStatus

__all__ = [
    "AibindError",
    "AsyncPostgresClient",
    "AsyncPostgresStreamStore",
    "AsyncStreamWriter",
    "CleanupResult",
    "InvalidDataError",
    "PostgresClient",
    "PostgresStreamStore",
    "SchemaError",
    "SequenceConflictError",
    "StoreClosedError",
    "StreamChunk",
    "StreamExistsError",
    "StreamInfo",
    "StreamNotActiveError",
    "StreamNotFoundError",
    "StreamState",
    "StreamStatus",
    "StreamWriteError",
    "StreamWriter",
    "wrap_asyncpg",
    "wrap_django",
    "wrap_sqlalchemy",
]
