"""The commands `conversations list`, `show`, `export` and `delete`."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Annotated, NoReturn

import typer

from .._sync.conversation_store import PostgresConversationStore
from .._sync.stream_store import PostgresStreamStore
from .._tables import Table
from ..errors import InvalidHistoryError
from ..models import ConversationInfo
from .export_files import new_file
from .exporting import export_conversations
from .message_drawing import draw_messages, shorten
from .options import (
    ALL_TABLES,
    CONVERSATION_TABLES,
    Json,
    Yes,
    examples,
    with_target,
)
from .target import FAILED, NOT_FOUND, Target, confirm, exit_with, open_both_stores, open_connection, require_terminal
from .text_output import age, align, aligned_pages, fields, printable
from .transfer import All, CountsAsJson, IdAndFile, Owner, parse_selection, report_export

app = typer.Typer(no_args_is_help=True)

HEADING = ("ID", "OWNER", "TITLE", "SAVED", "RUNNING")
MAX_TITLE = 60  # characters
MAX_MESSAGE = 100  # characters

SessionId = Annotated[str, typer.Argument(metavar="ID", help="The conversation's id (session_id).", show_default=False)]


@app.command("list", epilog=examples("conversations list --owner ann", "conversations list --json | jq -r .session_id"))
@with_target(*CONVERSATION_TABLES)
def list_conversations(
    target: Target,
    owner: Annotated[str | None, typer.Option("--owner", metavar="O", help="Only conversations of this owner.")] = None,
    as_json: Json = False,
) -> None:
    """List the conversations, the last saved first.

    Prints the owner, the title, the time since the last save, and the stream of a running answer. With --json, prints
    one line of JSON for each conversation.
    """
    with open_both_stores(target) as (_, conversations):
        found = conversations.list(owner)
        if as_json:
            for info in found:
                print(json.dumps(fields(info), ensure_ascii=False))
            return
        now = datetime.now(timezone.utc)
        for lines in aligned_pages(HEADING, (_row(info, now) for info in found)):
            print(lines, end="")


def _row(info: ConversationInfo, now: datetime) -> list[str]:
    title = None if info.title is None else shorten(info.title, MAX_TITLE)
    cells = [info.session_id, info.owner, title, age(info.updated_at, now), info.active_stream_id]
    return ["-" if cell is None else printable(cell) for cell in cells]


@app.command(epilog=examples("conversations show chat-1", "conversations show chat-1 --json | jq .document.nodes"))
@with_target(*CONVERSATION_TABLES)
def show(target: Target, id: SessionId, as_json: Json = False) -> None:
    """Show the fields of a conversation, and its messages.

    Prints a line for each message, with its role and the beginning of its text. Alternatives are indented. A star marks
    the messages of the current path. With --json, prints whole messages.
    """
    with open_both_stores(target) as (_, conversations):
        info = conversations.get_info(id)
        if info is None:
            _exit_not_found(id)
        try:
            chat = conversations.load(id)
        except InvalidHistoryError as error:  # which is no wrong usage
            exit_with(FAILED, f"conversation {id!r} cannot be shown: {error}")
        if as_json:
            print(json.dumps({**fields(info), "document": json.loads(chat.to_json())}, ensure_ascii=False, indent=2))
            return
        now = datetime.now(timezone.utc)
        described = {
            "id": info.session_id,
            "owner": info.owner,
            "title": info.title,
            "created": _time(info.created_at, now),
            "saved": _time(info.updated_at, now),
            "expires": "never" if info.expires_at is None else info.expires_at.isoformat(),
            "running": info.active_stream_id,
            "metadata": None if info.metadata is None else json.dumps(info.metadata, ensure_ascii=False),
            "messages": f"{len(chat)}, of which {len(chat.node_ids)} on the current path",
        }
        rows = [(f"{name}:", "-" if value is None else printable(value)) for name, value in described.items()]
        print(align(rows, [0, 0]))
        for line in draw_messages(chat, MAX_MESSAGE):
            print(line)


def _time(time: datetime | None, now: datetime) -> str | None:
    return None if time is None else f"{time.isoformat()} ({age(time, now)} ago)"


@app.command(
    epilog=examples(
        "conversations export chat-1 chat.jsonl",
        "conversations export --all conversations.jsonl.gz",
        "conversations export --owner ann - | jq 'select(.type == \"conversation\") | .data | fromjson'",
    )
)
@with_target("conversations_table")
def export(
    target: Target, arguments: IdAndFile, everything: All = False, owner: Owner = None, as_json: CountsAsJson = False
) -> None:
    """Export conversations to a file of JSON lines.

    Exports conversations that have not expired, from one snapshot. The file is named FILE.partial until it is complete.
    `aibind-postgres import` reads it.
    """
    selection, file = parse_selection(arguments, everything, owner, as_json)
    with open_connection(target) as connection:
        table = Table.parse(target.conversations_table)
        with new_file(file) as output:
            counts = export_conversations(connection, table, selection, output.write)
            if selection.id is not None and not counts.conversations:
                _exit_not_found(selection.id)
        report_export(counts, f"{counts.conversations} conversations", file, as_json)


@app.command(epilog=examples("conversations delete chat-1", "conversations delete chat-1 --yes --json"))
@with_target(*ALL_TABLES)
def delete(target: Target, id: SessionId, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a conversation with its streams.

    Asks for confirmation on a terminal. Without a terminal, --yes is required. A running answer is stopped. Streams of
    other owners are kept.
    """
    if not yes:
        require_terminal()
    with open_both_stores(target) as (streams, conversations):
        info = conversations.get_info(id)
        if info is None:
            _exit_not_found(id)
        if not yes:
            title = "" if info.title is None else f", titled {info.title!r},"
            confirm(f"Delete conversation {id!r} of owner {info.owner!r}{title} with its streams?")
        deleted = _delete(info, streams, conversations)
        result = {"conversations": 1, "streams": deleted}
        print(json.dumps(result) if as_json else f"deleted streams: {deleted}, conversations: 1")


def _delete(info: ConversationInfo, streams: PostgresStreamStore, conversations: PostgresConversationStore) -> int:
    """Delete the streams of a conversation, the conversation, and then streams of answers that began meanwhile."""
    owners = (None, info.owner)
    deleted = 0
    for step in (None, conversations.delete):
        if step is not None:
            step(info.session_id)
        for stream in list(streams.list(session_id=info.session_id)):
            if info.owner is None or stream.owner in owners:
                deleted += streams.delete(stream.id)
    return deleted


def _exit_not_found(id: str) -> NoReturn:
    exit_with(NOT_FOUND, f"conversation {id!r} not found: it was never created, was deleted, or has expired")
