"""Answer a question of a conversation again, for Flask and Django. The new answer becomes an alternative."""

from aibind_postgres import DurableStream, PostgresConversationStore, PostgresStreamStore, StreamStatus

from . import messages
from .model import answer


def start(store: PostgresStreamStore, conversations: PostgresConversationStore, session: str, id: str) -> str:
    """Start another answer to the question `id`, and return the id of its stream.

    Raises:
        LookupError: The conversation has no question with this id.
        ValueError: The id of the conversation is invalid.
    """
    history, answers = messages.up_to_question(conversations.load(session), id)

    def save(text: str, status: StreamStatus | None) -> None:
        with conversations.edit(session) as chat:
            messages.add_answer(chat, id, text, status)

    return DurableStream.start(store, answer(history, answers + 1), on_finish=save).id
