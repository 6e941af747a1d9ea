"""The turns of a chat: add questions and answers to a conversation, and select the messages for the model. Pure.

The handlers store these metadata with a question and an answer:

- `streamId` of a question: the id of the last stream that was started to answer it. The message with the answer gets
  the same id, so that several processes store it only once.
- `state` of an answer: `stopped`, `error` or `deleted`. A complete answer has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import WebError
from .wire.aibind import WIRE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._message_tree import MessageTree, TreeNode
    from .history import ChatHistory
    from .models import StreamStatus

STREAM_ID, STATE = "streamId", "state"  # metadata

MAX_UNANSWERED = 20  # bounds the look-ups for one conversation; older turns have most likely failed without a text


class Position(NamedTuple):
    """The position of a question in the conversation, as parsed from the body of a request.

    Attributes:
        parent_id: The id of the message before the question. None for the beginning of the conversation.
        is_given: Whether the client has sent `parent_id`. Otherwise the question follows the current path.
        regenerate: Whether the client wants another answer to a stored question: to `parent_id`, or to the last
            question of the current path.
    """

    parent_id: str | None = None
    is_given: bool = False
    regenerate: bool = False


class Question(NamedTuple):
    """A stored question that a stream answers.

    Attributes:
        id: The id of the message.
        message: The message.
        stream_id: The id of the stream, and of the message with the answer.
    """

    id: str
    message: Any
    stream_id: str


def ask(chat: ChatHistory[Any], stream_id: str, *, prompt: str, position: Position) -> Question:
    """Add a question to a conversation, or select a stored one to regenerate. It becomes the end of the current path.

    Args:
        chat: The conversation.
        stream_id: The id of the stream that will answer the question.
        prompt: The text of the question. Not used to regenerate.
        position: The position of the question, or the question to regenerate.

    Raises:
        WebError: 400: `parent_id` is not the id of a message. To regenerate, it must be the id of a question.
    """
    tree = chat.tree
    parent_id = position.parent_id if position.is_given else tree.active_leaf_id
    if position.is_given and parent_id is not None and parent_id not in tree:
        raise WebError(400, "parentId is not the id of a message of this conversation")
    if not position.regenerate:
        return add_question(tree, parent_id, {"role": "user", "content": prompt}, stream_id)
    while not position.is_given and parent_id is not None and not _is_question(tree._snapshot(parent_id)):
        parent_id = tree._snapshot(parent_id).parent_id
    if parent_id is None or not _is_question(tree._snapshot(parent_id)):
        raise WebError(400, "there is no question to answer again: parentId must be the id of a message of the user")
    return ask_again(tree, parent_id, stream_id)


def ask_again(tree: MessageTree[Any], question_id: str, stream_id: str) -> Question:
    """Select a stored question for another answer. It becomes the end of the current path."""
    tree.set_active_leaf(question_id)
    tree._set_metadata(question_id, STREAM_ID, stream_id)
    return Question(question_id, tree._snapshot(question_id).message, stream_id)


def add_question(tree: MessageTree[Any], parent_id: str | None, message: Any, stream_id: str) -> Question:
    """Add a question below a message, and make it the end of the current path.

    Many models refuse two questions in a row, and blank answers. If `parent_id` is a question, the new question follows
    the last answer to it that has a text. Without such an answer, the two questions become alternatives.
    """
    while parent_id is not None and _cannot_precede_question(node := tree._snapshot(parent_id)):
        answers = _answers(tree, parent_id) if _is_question(node) else []
        parent_id = answers[-1] if answers else node.parent_id
    return Question(
        tree.set_active_leaf(tree._add_node(parent_id, message, {STREAM_ID: stream_id})), message, stream_id
    )


def model_messages(path: list[Any], max_messages: int | None) -> list[Any]:
    """Return the messages for the model: those before a question, and the question.

    Args:
        path: The messages of the current path. The last one is the question.
        max_messages: The maximum number of messages before the question. They begin with a message of the user.
            Messages with the role `system` do not count, and are always included. None for no limit.
    """
    *earlier, question = path
    if max_messages is None:
        return path
    others = [index for index, message in enumerate(earlier) if _role(message) != "system"][-max_messages:]
    first = next((index for index in others if _role(earlier[index]) == "user"), len(earlier))
    kept = [message for index, message in enumerate(earlier) if index >= first or _role(message) == "system"]
    return [*kept, question]


def text_answer(question: Question, chunks: Sequence[str]) -> Any:
    """Return the message with the text of a stream, for `AsyncTurns`."""
    return {"role": "assistant", "content": WIRE.text(chunks)}


def answer(chat: ChatHistory[Any], question: Question, message: Any, status: StreamStatus | None) -> bool:
    """Add an answer to its question. If the question is the end of the current path, the answer becomes the end.

    If another stream is regenerating the answer, the current path still ends with the question. If the question was
    removed, such as by a summary, it is added again at the end of the current path, with its answer.

    Args:
        chat: The conversation.
        question: The question.
        message: The message with the answer.
        status: The final status of the stream. None if it was deleted.

    Returns:
        Whether the conversation has changed. If the last stream of a question ended with a blank answer and not as
        done, the current path returns to an earlier answer, if there is one.
    """
    tree = chat.tree
    state = "deleted" if status is None else status.state
    if state == "active":  # the server could not be reached to end it
        state = "error"
    if question.stream_id in tree:
        return False
    if state != "done" and is_blank(message):
        earlier = _answers(tree, question.id) if tree.active_leaf_id == question.id else []
        if not earlier or tree._snapshot(question.id).metadata.get(STREAM_ID) != question.stream_id:
            return False
        tree.set_active_leaf(tree._first_leaf(earlier[-1]))
        return True
    if question.id not in tree:
        question = add_question(tree, tree.active_leaf_id, question.message, question.stream_id)
    metadata = {} if state == "done" else {STATE: state}
    tree._add_node(question.id, message, metadata, node_id=question.stream_id)
    newest = tree._snapshot(question.id).metadata.get(STREAM_ID)
    if tree.active_leaf_id == question.id and newest in (question.stream_id, None):
        tree.set_active_leaf(question.stream_id)
    return True


def unanswered(chat: ChatHistory[Any]) -> list[Question]:
    """Return the newest `MAX_UNANSWERED` questions for which the answer of their last stream is not stored.

    Their stream is active, or was abandoned by a process that died, or failed without a text.
    """
    questions = []
    for node_id, node in chat.tree._nodes.items():
        stream_id = node.get("metadata", {}).get(STREAM_ID)
        if isinstance(stream_id, str) and stream_id not in chat.tree:
            questions.append(Question(node_id, node["message"], stream_id))
    return questions[-MAX_UNANSWERED:]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _is_question(node: TreeNode[Any]) -> bool:
    return bool(_role(node.message) == "user")


def _answers(tree: MessageTree[Any], question_id: str) -> list[str]:
    """Return the ids of the answers to a question that have a text."""
    children = [tree._snapshot(child_id) for child_id in tree._snapshot(question_id).children]
    answers = [child for child in children if _role(child.message) == "assistant"]
    return [answer.id for answer in answers if not _cannot_precede_question(answer)]


def _cannot_precede_question(node: TreeNode[Any]) -> bool:
    """Return True for a question that a handler has stored, and for a blank answer."""
    if _is_question(node):
        return STREAM_ID in node.metadata
    return is_blank(node.message)


def is_blank(message: Any) -> bool:
    """Return True for an answer that has neither a text nor another part. Some models refuse it in later turns."""
    if _role(message) != "assistant":
        return False
    content, parts = message.get("content"), message.get("parts")
    if isinstance(parts, list):
        return all(part == {"type": "step-start"} for part in parts)
    return isinstance(content, str) and not content.strip()
