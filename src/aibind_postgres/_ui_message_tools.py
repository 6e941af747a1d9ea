"""The tool calls of a UIMessage, as a client of the AI SDK builds them from chunks. Pure."""

from __future__ import annotations

from typing import Any

from ._partial_json import ABSENT, parse_partial_json

Chunk = dict[str, Any]
Part = dict[str, Any]


class UnreadableError(Exception):
    """The client stops reading at this chunk."""


class Text:
    """A text, reasoning or tool input that grows. Its pieces are joined once, as concatenation would be quadratic."""

    def __init__(self, text: str = "") -> None:
        self.pieces = [text]

    def join(self, count: int | None = None) -> str:
        """Return the text of the first `count` pieces. Default: all."""
        text = "".join(self.pieces[:count])
        try:
            text.encode()
        except UnicodeEncodeError:
            # A character may have been split into two surrogates, in two chunks.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return text


class _Call:
    """A tool call with a streamed input."""

    def __init__(self, chunk: Chunk, text: str = "") -> None:
        self.text = Text(text)
        self.name: str = chunk["toolName"]
        self.is_dynamic = bool(chunk.get("dynamic"))
        self.details = {
            name: chunk[name] for name in ("title", "toolMetadata", "inputEncoding") if chunk.get(name) is not None
        }


# Each change of a tool call removes these fields, unless it sets them.
_REPLACED = ("input", "output", "errorText", "rawInput", "preliminary", "inputEncoding")


class ToolCalls:
    """The tool calls of one message.

    Args:
        parts: The parts of the message, to which parts of tool calls are added.
        sdk_version: The major version of the client's `ai` package: 5, 6 or 7.
    """

    def __init__(self, parts: list[Part], sdk_version: int) -> None:
        self._parts = parts
        self._version = sdk_version
        self._calls: dict[str, _Call] = {}  # with a streamed input
        # The parts with a streamed input: part, call, number of its pieces, whether the part gets `rawInput`.
        self._inputs: dict[int, tuple[Part, _Call, int, bool]] = {}
        # Parts by kind and call id: the first one in the current step, and all of them. Any kind: "".
        self._step_parts: dict[tuple[str, str], Part] = {}
        self._all_parts: dict[tuple[str, str], list[Part]] = {}

    def add(self, part: Part) -> None:
        """Add a part to the message."""
        self._parts.append(part)
        if isinstance(call_id := part.get("toolCallId"), str):
            for key in ((_kind(part), call_id), ("", call_id)):
                self._step_parts.setdefault(key, part)
                self._all_parts.setdefault(key, []).append(part)

    def begin_step(self) -> None:
        """Take the beginning of a step: most chunks change calls of the current step only."""
        self._step_parts.clear()

    def continue_inputs(self) -> None:
        """Let chunks continue the streamed inputs of the current step, which were left by an earlier stream."""
        for (kind, call_id), part in self._step_parts.items():
            if kind and part.get("state") == "input-streaming":
                raw = part.get("rawInput")
                call = {**part, "toolName": _tool_name(part), "dynamic": kind == "dynamic"}
                self._calls[call_id] = _Call(call, raw if isinstance(raw, str) else "")

    def reset_step(self, removed: list[Part]) -> None:
        """Take the removal of the last parts of the message, those of the current step."""
        self._calls.clear()
        self._step_parts.clear()
        for part in reversed(removed):
            if is_call(part) and isinstance(call_id := part.get("toolCallId"), str):
                for key in ((_kind(part), call_id), ("", call_id)):
                    self._all_parts[key].pop()

    def finish(self) -> None:
        """Parse the inputs that are still streamed."""
        for part, *_ in list(self._inputs.values()):
            self._finish_input(part)

    def _find_call(self, call_id: str, kind: str = "") -> Part:
        part = self._step_parts.get((kind, call_id))
        if part is None:
            parts = self._all_parts.get((kind, call_id))
            if not parts:
                raise UnreadableError
            part = parts[-1]
        return part

    def _update_call(
        self, state: str, call_id: str, name: str, is_dynamic: bool, values: Part, part: Part | None = None
    ) -> Part:
        """Change the part of a tool call, or add one if the current step has none. Return it.

        Args:
            values: The fields to set, with the metadata as `providerMetadata`. Missing ones of `_REPLACED` are removed.
            part: Default: the part of the current step.
        """
        if part is None:
            part = self._step_parts.get(("dynamic" if is_dynamic else "static", call_id))
        is_new = part is None
        if part is None:
            part = {"type": "dynamic-tool" if is_dynamic else f"tool-{name}", "toolCallId": call_id}
            self.add(part)
        else:
            self._inputs.pop(id(part), None)
            for field in _REPLACED if self._version > 5 else _REPLACED[:-1]:
                part.pop(field, None)
        metadata = values.pop("providerMetadata", None)
        part.update(values)
        part["state"] = state
        if is_dynamic:
            part["toolName"] = name
        elif self._version > 5:
            part["type"] = f"tool-{name}"
        if metadata is None:
            pass
        elif self._version > 5:
            part["callProviderMetadata" if state.startswith("input") else "resultProviderMetadata"] = metadata
        elif is_new or state == "input-available":
            part["callProviderMetadata"] = metadata
        return part

    def on_input_start(self, chunk: Chunk) -> None:
        call = self._calls[chunk["toolCallId"]] = _Call(chunk)
        values = given(chunk, "providerExecuted")
        if self._version > 5:
            values.update(call.details, **given(chunk, "providerMetadata"))
        self._update_call("input-streaming", chunk["toolCallId"], call.name, call.is_dynamic, values)

    def on_input_delta(self, chunk: Chunk) -> None:
        call_id = chunk["toolCallId"]
        call = self._calls.get(call_id)
        if call is None:
            raise UnreadableError
        call.text.pieces.append(chunk["inputTextDelta"])
        is_new = ("dynamic" if call.is_dynamic else "static", call_id) not in self._step_parts
        details = call.details if self._version > 5 else {}
        part = self._update_call("input-streaming", call_id, call.name, call.is_dynamic, dict(details))
        # The input is parsed when it is needed: to parse the text after each piece would be quadratic.
        self._inputs[id(part)] = part, call, len(call.text.pieces), not (is_new and call.is_dynamic)

    def _finish_input(self, part: Part) -> None:
        """Parse the streamed input of a part, unless it is parsed."""
        _, call, count, has_raw = self._inputs.pop(id(part), (part, None, 0, False))
        if call is None:
            return
        text = call.text.join(count)
        is_text = self._version > 5 and call.details.get("inputEncoding") == "text"
        value = text if is_text else parse_partial_json(text, self._version)
        if has_raw:
            part["rawInput"] = text
        if value is not ABSENT:
            part["input"] = value

    def on_input_available(self, chunk: Chunk) -> None:
        values = given(chunk, "providerExecuted", "providerMetadata")
        if self._version > 5:
            values.update(given(chunk, "title", "toolMetadata"))
        if "input" in chunk:
            values["input"] = chunk["input"]
        is_dynamic = bool(chunk.get("dynamic"))
        self._update_call("input-available", chunk["toolCallId"], chunk["toolName"], is_dynamic, values)

    def on_input_error(self, chunk: Chunk) -> None:
        is_dynamic = bool(chunk.get("dynamic"))
        values = given(chunk, "errorText", "providerExecuted", "providerMetadata")
        if self._version > 5:
            values.update(given(chunk, "toolMetadata"))
            existing = self._step_parts.get(("", chunk["toolCallId"]))
            is_dynamic = is_dynamic if existing is None else _kind(existing) == "dynamic"
        if "input" in chunk:
            values["input" if is_dynamic or self._version > 6 else "rawInput"] = chunk["input"]
        self._update_call("output-error", chunk["toolCallId"], chunk["toolName"], is_dynamic, values)

    def on_output(self, chunk: Chunk) -> None:
        has_failed = chunk["type"] == "tool-output-error"
        if self._version > 5:
            part = self._find_call(chunk["toolCallId"])
            values = given(chunk, "providerExecuted", "providerMetadata", "toolMetadata")
        else:
            part = self._find_call(chunk["toolCallId"], "dynamic" if chunk.get("dynamic") else "static")
            values = given(chunk, "providerExecuted") if has_failed or not chunk.get("dynamic") else {}
        is_dynamic = _kind(part) == "dynamic"
        self._finish_input(part)
        kept = ("input", "rawInput") if has_failed and not is_dynamic else ("input",)
        values.update({name: part[name] for name in kept if name in part})
        if has_failed:
            values["errorText"] = chunk["errorText"]
        else:
            values.update(given(chunk, "preliminary"))
            if "output" in chunk:
                values["output"] = chunk["output"]
        state = "output-error" if has_failed else "output-available"
        self._update_call(state, chunk["toolCallId"], _tool_name(part), is_dynamic, values, part)

    def on_denied(self, chunk: Chunk) -> None:
        self._find_call(chunk["toolCallId"])["state"] = "output-denied"

    def on_approval_request(self, chunk: Chunk) -> None:
        part = self._find_call(chunk["toolCallId"])
        part["state"] = "approval-requested"
        approval = {"id": chunk["approvalId"], **given(chunk, "signature")}
        if chunk.get("approvalDescriptor") is not None:
            approval["descriptor"] = chunk["approvalDescriptor"]
        if "inputSchemaInput" in chunk:
            approval["inputSchemaInput"] = chunk["inputSchemaInput"]
        if self._version >= 7:
            if chunk.get("reason") is not None:
                approval["requestReason"] = chunk["reason"]
            if chunk.get("isAutomatic"):
                approval["isAutomatic"] = True
        part["approval"] = approval

    def on_approval_response(self, chunk: Chunk) -> None:
        id = chunk["approvalId"]
        for part in self._parts:
            approval = part.get("approval")
            if is_call(part) and isinstance(approval, dict) and approval.get("id") == id:
                break
        else:
            raise UnreadableError
        part["state"] = "approval-responded"
        part["approval"] = {**approval, "approved": chunk["approved"], **given(chunk, "reason")}
        part.update(given(chunk, "providerExecuted"))
        if chunk.get("providerMetadata") is not None:
            part["callProviderMetadata"] = chunk["providerMetadata"]


HANDLERS = {
    "tool-input-start": ToolCalls.on_input_start,
    "tool-input-delta": ToolCalls.on_input_delta,
    "tool-input-available": ToolCalls.on_input_available,
    "tool-input-error": ToolCalls.on_input_error,
    "tool-approval-request": ToolCalls.on_approval_request,
    "tool-approval-response": ToolCalls.on_approval_response,
    "tool-output-available": ToolCalls.on_output,
    "tool-output-error": ToolCalls.on_output,
    "tool-output-denied": ToolCalls.on_denied,
}


def given(chunk: Chunk, *names: str) -> dict[str, Any]:
    """Return the fields of a chunk that are not None."""
    return {name: chunk[name] for name in names if chunk.get(name) is not None}


def is_call(part: Part) -> bool:
    """Return whether a part is that of a tool call."""
    return part["type"] == "dynamic-tool" or bool(part["type"].startswith("tool-"))


def _kind(part: Part) -> str:
    return "dynamic" if part["type"] == "dynamic-tool" else "static"


def _tool_name(part: Part) -> str:
    name = part.get("toolName") if part["type"] == "dynamic-tool" else part["type"].removeprefix("tool-")
    return name if isinstance(name, str) else ""
