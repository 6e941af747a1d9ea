"""The turns of a chat: where a question goes, what the model gets, and where the answer goes. Pure.

A question and an answer of a `StreamHandler` are messages with these metadata:

- `streamId` of a question: the id of the stream that answers it, or that has answered it last. The message with the
  answer has the same id, so that it is stored once, however many processes try.
- `state` of an answer: `stopped`, `error` or `deleted`, if its stream was not done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import WebError

if TYPE_CHECKING:
    from ._message_tree import MessageTree, TreeNode
    from .history import ChatHistory
    from .models import StreamStatus

STREAM_ID, STATE = "streamId", "state"  # metadata

MAX_UNANSWERED = 20  # more of them have failed for good


class Position(NamedTuple):
    """Where a client wants a question to be, as parsed from the body of a request.

    Attributes:
        parent_id: The id of the message before the question. None for the beginning of the conversation.
        is_given: Whether the client has sent `parent_id`. Otherwise the question follows the current path.
        regenerate: Whether the client wants another answer to a question that is stored: `parent_id`, or the last one
            of the current path.
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


def ask(chat: ChatHistory[Any], prompt: str, position: Position, stream_id: str) -> Question:
    """Add a question to a conversation, or choose one that is answered again, and make it the end of the current path.

    Args:
        chat: The conversation.
        prompt: The text of the question. Not used if the question is answered again.
        position: Where to put it.
        stream_id: The id of the stream that will answer it.

    Raises:
        WebError: 400: `parent_id` is not the id of a message, or, to answer a question again, of a question.
    """
    tree = chat.tree
    parent_id = position.parent_id if position.is_given else tree.active_leaf_id
    if position.is_given and parent_id is not None and parent_id not in tree:
        raise WebError(400, "parentId is not the id of a message of this conversation")
    if not position.regenerate:
        return _add_question(tree, parent_id, {"role": "user", "content": prompt}, stream_id)
    while not position.is_given and parent_id is not None and not _is_question(tree._snapshot(parent_id)):
        parent_id = tree._snapshot(parent_id).parent_id
    if parent_id is None or not _is_question(tree._snapshot(parent_id)):
        raise WebError(400, "there is no question to answer again: parentId must be the id of a message of the user")
    tree.set_active_leaf(parent_id)
    tree._set_metadata(parent_id, STREAM_ID, stream_id)
    return Question(parent_id, tree._snapshot(parent_id).message, stream_id)


def _add_question(tree: MessageTree[Any], parent_id: str | None, message: Any, stream_id: str) -> Question:
    """Add a question below a message, and make it the end of the current path.

    Two questions never follow each other, and no answer is blank, since many models refuse that. The new question
    follows the last answer with a text to the question before it. If there is none, the two become alternatives.
    """
    while parent_id is not None and _is_unusable(node := tree._snapshot(parent_id)):
        answers = _answers(tree, parent_id) if _is_question(node) else []
        parent_id = answers[-1] if answers else node.parent_id
    return Question(
        tree.set_active_leaf(tree._add_node(parent_id, message, {STREAM_ID: stream_id})), message, stream_id
    )


def model_messages(path: list[Any], max_messages: int | None) -> list[Any]:
    """Return the messages for the model: those before a question, and the question.

    Args:
        path: The messages of the current path. The last one is the question.
        max_messages: The maximum number of messages before the question. The first one of them is a user's. Messages
            with the role `system` do not count, and are always included. None for no limit.
    """
    *earlier, question = path
    if max_messages is None:
        return path
    others = [index for index, message in enumerate(earlier) if _role(message) != "system"][-max_messages:]
    first = next((index for index in others if _role(earlier[index]) == "user"), len(earlier))
    kept = [message for index, message in enumerate(earlier) if index >= first or _role(message) == "system"]
    return [*kept, question]


def answer(chat: ChatHistory[Any], question: Question, text: str, status: StreamStatus | None) -> bool:
    """Add an answer to its question. It becomes the end of the current path if the question is.

    If the question is being answered again by another stream, the current path waits for that one. If the question was
    removed, as by a summary, question and answer follow the current path.

    Args:
        chat: The conversation.
        question: The question.
        text: The text of the stream.
        status: The final status of the stream. None if it was deleted.

    Returns:
        Whether the conversation has changed. If a stream without a text has failed to answer a question again, the
        current path returns to the earlier answer.
    """
    tree = chat.tree
    state = "deleted" if status is None else status.state
    if state == "active":  # the server could not be reached to end it
        state = "error"
    if question.stream_id in tree:
        return False
    if state != "done" and not text.strip():
        earlier = _answers(tree, question.id) if tree.active_leaf_id == question.id else []
        if not earlier or tree._snapshot(question.id).metadata.get(STREAM_ID) != question.stream_id:
            return False
        tree.set_active_leaf(tree._first_leaf(earlier[-1]))
        return True
    if question.id not in tree:
        question = _add_question(tree, tree.active_leaf_id, question.message, question.stream_id)
    metadata = {} if state == "done" else {STATE: state}
    message = {"role": "assistant", "content": text}
    tree._add_node(question.id, message, metadata, node_id=question.stream_id)
    newest = tree._snapshot(question.id).metadata.get(STREAM_ID)
    if tree.active_leaf_id == question.id and newest in (question.stream_id, None):
        tree.set_active_leaf(question.stream_id)
    return True


def unanswered(chat: ChatHistory[Any]) -> list[Question]:
    """Return the questions for which the answer of their last stream is not stored: the last `MAX_UNANSWERED` asked.

    The stream is being produced, or its process has died, or it failed without a text.
    """
    questions = []
    for node_id, node in chat.tree._nodes.items():
        stream_id = node.get("metadata", {}).get(STREAM_ID)
        if isinstance(stream_id, str) and stream_id not in chat.tree and _role(node.get("message")) == "user":
            questions.append(Question(node_id, node["message"], stream_id))
    return questions[-MAX_UNANSWERED:]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _is_question(node: TreeNode[Any]) -> bool:
    return bool(_role(node.message) == "user")


def _answers(tree: MessageTree[Any], question_id: str) -> list[str]:
    """Return the ids of the answers to a question that have a text."""
    children = [tree._snapshot(child_id) for child_id in tree._snapshot(question_id).children]
    return [child.id for child in children if _role(child.message) == "assistant" and not _is_unusable(child)]


def _is_unusable(node: TreeNode[Any]) -> bool:
    """Return whether a message is a question of a `StreamHandler`, or a blank answer."""
    if _is_question(node):
        return STREAM_ID in node.metadata
    if _role(node.message) != "assistant":
        return False
    content = node.message.get("content")
    return isinstance(content, str) and not content.strip()
