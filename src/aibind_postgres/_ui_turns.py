"""Requests of the AI SDK's clients, and the turns of a chat of UI messages. Pure.

A stored message is a UIMessage. Its `id` is the id on the page. Alternatives of an edited message share it, so nodes
have other ids. After the page has sent the result of a tool, the answer continues an assistant message: it follows that
message and has its id, and the page shows the last of them.

Facts of the protocol: npm `ai` 5.0.277, 6.0.326 and 7.0.173.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ._document import MAX_DEPTH, copy_json
from ._json import compact_json
from ._turns import STATE, STREAM_ID, Question, add_question, ask_again
from .errors import InvalidDataError, WebError
from .history import new_id
from .web import WebRequest, parse_body

if TYPE_CHECKING:
    from ._message_tree import MessageTree
    from .history import ChatHistory

MAX_REPLACEMENT = 10_000  # characters

SUBMIT, REGENERATE = "submit-message", "regenerate-message"

UNKNOWN = "messageId is not the id of a message of this chat"
CONTINUED = "the chat has continued after this answer: load it again"

# The required fields of each type of part that a user's message may have, all of them texts.
_USER_PARTS: dict[str, tuple[str, ...]] = {"text": ("text",), "file": ("mediaType", "url")}
_ASSISTANT_PARTS = {
    "text",
    "reasoning",
    "reasoning-file",
    "file",
    "source-url",
    "source-document",
    "step-start",
    "custom",
    "steering-message",
    "dynamic-tool",
}

# The fields that the page sets with the result of a tool, by the state before and after.
_RESULTS = {
    ("input-available", "output-available"): ("state", "output"),
    ("input-available", "output-error"): ("state", "errorText"),
    ("approval-requested", "approval-responded"): ("state", "approval"),
    # The page asks the user, and runs the tool itself.
    ("approval-requested", "output-available"): ("state", "output", "approval"),
    ("approval-requested", "output-error"): ("state", "errorText", "approval"),
    ("approval-responded", "output-available"): ("state", "output"),
    ("approval-responded", "output-error"): ("state", "errorText"),
}


class UiRequest(NamedTuple):
    """A parsed request for an answer.

    Attributes:
        chat_id: The id of the chat.
        messages: The UIMessages that the client has sent. The last one is the new one.
        is_regeneration: Whether the client wants another answer to a stored question.
        message_id: The id of the message to answer again, or None.
        body: The whole JSON object.
    """

    chat_id: str
    messages: list[dict[str, Any]]
    is_regeneration: bool
    message_id: str | None
    body: Mapping[str, Any]


def parse_ui_request(request: WebRequest) -> UiRequest:
    """Parse `{id, messages, trigger, messageId}`, or `{id, message}` with the new message only.

    Raises:
        WebError: 400: a field is missing or invalid, or the last message is not a UIMessage of a user or an assistant.
            413: see `parse_body`.
    """
    body = parse_body(request)
    chat_id = _text(body, "id")
    if chat_id is None or not chat_id.strip():
        raise WebError(400, "id, the id of the chat, is required")
    if chat_id in (".", ".."):  # a browser removes them from the path of a later request
        raise WebError(400, f"{chat_id!r} cannot be the id of a chat")
    if chat_id.startswith("/") or chat_id.endswith(("/stream", "/stop")):  # other routes would answer
        raise WebError(400, "the id of a chat cannot begin with a slash, and not end with /stream or /stop")
    trigger = SUBMIT if body.get("trigger") is None else body["trigger"]
    if trigger not in (SUBMIT, REGENERATE):
        raise WebError(400, f"trigger must be {SUBMIT} or {REGENERATE}")
    is_regeneration = trigger == REGENERATE
    messages = body.get("messages", [] if is_regeneration else None)
    if body.get("message") is not None:
        messages = [body["message"]]
    if not isinstance(messages, list) or not (messages or is_regeneration):
        raise WebError(400, "message or messages is required")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("parts"), list):
            raise WebError(400, "each message must be a UIMessage: an object with role and parts")
    if is_regeneration:  # the last message may be the answer to replace
        questions = [index for index, message in enumerate(messages) if message.get("role") != "assistant"]
        messages = messages[: questions[-1] + 1] if questions else []
    if messages:
        messages = [*messages[:-1], _checked_message(messages[-1])]
    return UiRequest(chat_id, messages, is_regeneration, _text(body, "messageId"), body)


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise WebError(400, f"{name} must be a string")
    return value


def _checked_message(message: dict[str, Any]) -> dict[str, Any]:
    role, parts = message.get("role"), message["parts"]
    if role not in ("user", "assistant"):
        raise WebError(400, "the last message must have the role user or assistant")
    if not parts:
        raise WebError(400, "the last message must have parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise WebError(400, "each part of a message must be an object with a type")
        if kind.startswith("data-"):
            required: tuple[str, ...] = ()
        elif role == "user":
            if kind not in _USER_PARTS:
                raise WebError(400, f"a message of a user cannot have a part of type {kind[:100]!r}")
            required = _USER_PARTS[kind]
        elif kind not in _ASSISTANT_PARTS and not kind.startswith("tool-"):
            raise WebError(400, f"unknown type of a part: {kind[:100]!r}")
        else:
            required = ()
        if not all(isinstance(part.get(field), str) for field in required):
            raise WebError(400, f"a part of type {kind} needs {' and '.join(required)}")
    message_id = message.get("id") or new_id()
    if not isinstance(message_id, str):
        raise WebError(400, "the id of a message must be a string")
    checked = {**message, "id": message_id}
    try:
        json.dumps(checked, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # no model accepts it, also not in a later turn
        raise WebError(400, "the message contains a lone surrogate, which is not a character") from None
    return checked


def ask_ui(chat: ChatHistory[Any], stream_id: str, *, request: UiRequest) -> Question:
    """Add the new message of a request to a chat, or select a stored question. It becomes the end of the current path.

    - A new message follows the stored current path, also if the page shows an older one.
    - A known message of a user that has changed is an edit: it becomes an alternative. If it has not changed, it was
      sent again, and is answered again.
    - A known assistant message brings results of tools: a copy with the results follows it, and is continued.

    Raises:
        WebError: 400: a message id is unknown. 409: results of tools have come for an answer that has been continued,
            or is no longer the last message.
    """
    tree = chat.tree
    if request.is_regeneration and (question_id := _question_to_regenerate(tree, request)) is not None:
        return ask_again(tree, question_id, stream_id)
    message = request.messages[-1]
    if not request.is_regeneration and request.message_id not in (None, message["id"]):
        named_id = _find(tree, str(request.message_id))
        if named_id is None:
            raise WebError(400, UNKNOWN)
        if _role(tree._snapshot(named_id).message) == "assistant":
            raise WebError(409, CONTINUED)  # results of tools for an earlier answer
    known_id = _find(tree, message["id"])
    if message["role"] == "assistant":
        if known_id is None:
            raise WebError(400, "the last message is not an answer of this chat")
        return _continue(tree, known_id, message, stream_id)
    if known_id is None:
        return add_question(tree, tree.active_leaf_id, message, stream_id)
    node = tree._snapshot(known_id)
    if _role(node.message) != "user":
        raise WebError(400, "the id of the message belongs to an answer")
    if node.message.get("parts") == message["parts"]:
        return ask_again(tree, known_id, stream_id)
    return add_question(tree, node.parent_id, message, stream_id)


def _question_to_regenerate(tree: MessageTree[Any], request: UiRequest) -> str | None:
    """Return the id of the node whose answer a request wants again. None if the request brings a new question.

    A page repeats a question that was refused, such as during another answer, in the same way as a stored one.
    """
    # The page does not send the id of an answer that has failed before it was stored, but its question.
    wanted = [request.message_id] if request.message_id is not None else []
    wanted += [message["id"] for message in request.messages[-1:] if isinstance(message.get("id"), str)]
    node_id = next((found for each in wanted if (found := _find(tree, each)) is not None), None)
    if node_id is None:
        if request.messages and _role(request.messages[-1]) == "user":
            return None
        if wanted:
            raise WebError(400, UNKNOWN)
        node_id = tree.active_leaf_id
    while node_id is not None and _role(tree._snapshot(node_id).message) != "user":
        node_id = tree._snapshot(node_id).parent_id
    if node_id is None:
        raise WebError(400, "there is no question to answer again")
    return node_id


def _find(tree: MessageTree[Any], message_id: str) -> str | None:
    """Return the id of the node with a message: the one on the current path, or else the newest one."""
    leaf_id = tree.active_leaf_id
    path = [] if leaf_id is None else tree._path_ids(leaf_id)
    for node_id in (*reversed(path), *reversed(tree._nodes)):
        if _ui_id(node_id, tree._nodes[node_id].get("message")) == message_id:
            return node_id
    return None


def _continue(tree: MessageTree[Any], node_id: str, sent: dict[str, Any], stream_id: str) -> Question:
    if node_id != tree.active_leaf_id:
        raise WebError(409, CONTINUED)
    stored = tree._snapshot(node_id).message
    if len(stored.get("parts", [])) > len(sent["parts"]):  # another page has sent its results, and got the answer
        raise WebError(409, CONTINUED)
    message = with_tool_results(stored, sent)
    if message == stored and not {STATE, STREAM_ID} & tree._snapshot(node_id).metadata.keys():
        raise WebError(409, "there is nothing to continue: the last answer is complete")
    copy_id = tree._add_node(node_id, message, {STREAM_ID: stream_id})
    return Question(tree.set_active_leaf(copy_id), message, stream_id)


def with_tool_results(stored: dict[str, Any], sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored assistant message with the results and approvals of tools that a page has sent.

    Nothing else that the page sends changes the message, and a tool call has one result.
    """
    calls = {part["toolCallId"]: part for part in sent["parts"] if isinstance(part.get("toolCallId"), str)}
    parts = []
    for part in stored.get("parts", []):
        result = calls.get(part.get("toolCallId"), {})
        fields = _RESULTS.get((part.get("state"), str(result.get("state"))), ())
        is_approval = result.get("state") == "approval-responded"
        if fields and (is_approval or not part.get("providerExecuted")):
            if not set(fields) <= result.keys() or not isinstance(result.get("errorText", ""), str):
                raise WebError(400, "the result of a tool call needs output, or errorText as a string")
            approval = _approval(part, result, is_approval) if "approval" in fields else {}
            part = {**part, **{field: result[field] for field in fields}, **approval}
        parts.append(part)
    return {**stored, "parts": parts}


def _approval(part: Mapping[str, Any], result: Mapping[str, Any], may_refuse: bool) -> dict[str, Any]:
    """Return the approval of a tool call with the decision of the user. A call with a result must be approved."""
    decision = result["approval"]
    approved = decision.get("approved") if isinstance(decision, Mapping) else None
    if not isinstance(approved, bool) or not (approved or may_refuse):
        raise WebError(400, "the approval of a tool call needs approved, true or false; with a result, true")
    reason = {"reason": decision["reason"]} if isinstance(decision.get("reason"), str) else {}
    return {"approval": {**part.get("approval", {}), "approved": approved, **reason}}


def storable_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that can be stored. Values that are nested too deeply are replaced by their JSON text,
    and halves of characters are joined or replaced.

    Such a value may come from a model: a partial input of a tool that consists of brackets.
    """
    try:
        copy_json(message)
    except InvalidDataError:
        return {field: _storable(value, MAX_DEPTH - 4) for field, value in message.items()}
    return message


def _storable(value: Any, depth: int) -> Any:
    """Return a field of a message. In the list of parts, replace single fields of the parts."""
    if isinstance(value, list):
        return [
            {field: _storable_field(each, depth) for field, each in part.items()} if isinstance(part, dict) else part
            for part in value
        ]
    return _storable_field(value, depth)


def _storable_field(value: Any, depth: int) -> Any:
    if isinstance(value, str):  # joins the halves of characters, and replaces those that stay alone
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return copy_json(value, depth)
    except InvalidDataError:
        return compact_json(value)[:MAX_REPLACEMENT]


def ui_messages(path: list[Any], node_ids: list[str]) -> list[dict[str, Any]]:
    """Return the UIMessages of a path. Messages of a `StreamHandler`, with a `content`, are converted."""
    messages: list[dict[str, Any]] = []
    for node_id, message in zip(node_ids, path, strict=True):
        if _role(message) not in ("user", "assistant", "system"):
            continue
        if not isinstance(message.get("parts"), list):
            text = message.get("content")
            parts = [{"type": "text", "text": text}] if isinstance(text, str) else []
            message = {"id": node_id, "role": message["role"], "parts": parts}
        elif not isinstance(message.get("id"), str):
            message = {**message, "id": node_id}
        if messages and messages[-1]["id"] == message["id"]:
            messages.pop()
        messages.append(message)
    return messages


def text_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return UIMessages as messages with `role` and `content`: their texts. Answers without a text are left out."""
    texts = [(message["role"], ui_text(message)) for message in messages]
    return [{"role": role, "content": text} for role, text in texts if text.strip() or role != "assistant"]


def ui_text(message: Mapping[str, Any]) -> str:
    """Return the texts of a UIMessage, as paragraphs."""
    parts = [part for part in message.get("parts", []) if isinstance(part, dict) and part.get("type") == "text"]
    return "\n\n".join([part["text"] for part in parts if isinstance(part.get("text"), str)])


def _ui_id(node_id: str, message: Any) -> Any:
    """Return the id of a message on the page."""
    return message.get("id", node_id) if isinstance(message, dict) else node_id


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
