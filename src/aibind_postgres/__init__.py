"""Durable, resumable token streams and branching conversations on the PostgreSQL you already run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AibindError,
    ConversationConflictError,
    ForkedError,
    InvalidDataError,
    InvalidHistoryError,
    MessageNotFoundError,
    SchemaError,
    SequenceConflictError,
    StoreClosedError,
    StreamExistsError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
    WebError,
)
from .history import ChatHistory, MessageTree, TreeNode, TreePath
from .models import (
    ArchiveResult,
    CleanupResult,
    ConversationInfo,
    ErasureResult,
    StoreCheck,
    StoredEvent,
    StreamChunk,
    StreamEvent,
    StreamInfo,
    StreamState,
    StreamStatus,
    TimedChunk,
)
from .web import Generation, Resource, WebRequest

__all__ = [
    "AgUiHandler",
    "AiSdkHandler",
    "AibindError",
    "ArchiveResult",
    "AsyncAgUiHandler",
    "AsyncAiSdkHandler",
    "AsyncDurableStream",
    "AsyncHousekeeper",
    "AsyncPostgresClient",
    "AsyncPostgresConversationStore",
    "AsyncPostgresStreamStore",
    "AsyncStreamHandler",
    "AsyncStreamWriter",
    "AsyncWebResponse",
    "ChatHistory",
    "CleanupResult",
    "ConversationConflictError",
    "ConversationInfo",
    "DurableStream",
    "ErasureResult",
    "ForkedError",
    "Generation",
    "Housekeeper",
    "InvalidDataError",
    "InvalidHistoryError",
    "MessageNotFoundError",
    "MessageTree",
    "PostgresClient",
    "PostgresConversationStore",
    "PostgresStreamStore",
    "Resource",
    "SchemaError",
    "SequenceConflictError",
    "StoreCheck",
    "StoreClosedError",
    "StoredEvent",
    "StreamChunk",
    "StreamEvent",
    "StreamExistsError",
    "StreamHandler",
    "StreamInfo",
    "StreamNotActiveError",
    "StreamNotFoundError",
    "StreamState",
    "StreamStatus",
    "StreamWriteError",
    "StreamWriter",
    "TimedChunk",
    "TreeNode",
    "TreePath",
    "WebError",
    "WebRequest",
    "WebResponse",
    "wrap_asyncpg",
    "wrap_django",
    "wrap_sqlalchemy",
]

# The modules of the names that are imported on first use, without the flavour: a program uses one flavour, and both
# together take most of the time of the import.
_MODULES = {
    "AgUiHandler": "ag_ui_handler",
    "AiSdkHandler": "ai_sdk_handler",
    "DurableStream": "durable_stream",
    "Housekeeper": "housekeeping",
    "PostgresClient": "client",
    "PostgresConversationStore": "conversation_store",
    "PostgresStreamStore": "stream_store",
    "StreamHandler": "handler",
    "StreamWriter": "stream_writer",
    "WebResponse": "responses",
}

if TYPE_CHECKING:
    from ._async.ag_ui_handler import AsyncAgUiHandler
    from ._async.ai_sdk_handler import AsyncAiSdkHandler
    from ._async.client import AsyncPostgresClient
    from ._async.conversation_store import AsyncPostgresConversationStore
    from ._async.durable_stream import AsyncDurableStream
    from ._async.handler import AsyncStreamHandler
    from ._async.housekeeping import AsyncHousekeeper
    from ._async.responses import AsyncWebResponse
    from ._async.stream_store import AsyncPostgresStreamStore
    from ._async.stream_writer import AsyncStreamWriter
    from ._sync.ag_ui_handler import AgUiHandler
    from ._sync.ai_sdk_handler import AiSdkHandler
    from ._sync.client import PostgresClient
    from ._sync.conversation_store import PostgresConversationStore
    from ._sync.durable_stream import DurableStream
    from ._sync.handler import StreamHandler
    from ._sync.housekeeping import Housekeeper
    from ._sync.responses import WebResponse
    from ._sync.stream_store import PostgresStreamStore
    from ._sync.stream_writer import StreamWriter
    from .adapters import wrap_asyncpg, wrap_django, wrap_sqlalchemy

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        plain = name.removeprefix("Async")
        if plain in _MODULES:
            flavour = "_sync" if plain == name else "_async"
            value = getattr(import_module(f".{flavour}.{_MODULES[plain]}", __name__), name)
        elif name.startswith("wrap_") and name in __all__:
            value = getattr(import_module(".adapters", __name__), name)
        elif name == "__version__":  # reading the metadata of the distribution takes about a millisecond
            value = import_module("importlib.metadata").version("aibind-postgres")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
