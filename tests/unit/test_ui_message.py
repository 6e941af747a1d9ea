"""UIMessages from chunks and back: each chunk type, and malformed input.

`tests/processes/test_ui_message_reader.py` compares many more streams with the published reader.
"""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aibind_postgres._partial_json import ABSENT, parse_partial_json
from aibind_postgres._ui_message import assemble
from aibind_postgres._ui_message_chunks import _FIELDS, _TYPES, is_known, is_valid, message_chunks

START = {"type": "start", "messageId": "m"}
STEP = {"type": "start-step"}
META = {"openai": {"itemId": "1"}}
CALL = {"type": "tool-input-available", "toolCallId": "c", "toolName": "find", "input": {"q": 1}}
CALL_PART = {"type": "tool-find", "toolCallId": "c", "state": "input-available", "input": {"q": 1}}


def parts(*chunks, version=7):
    return assemble(chunks, sdk_version=version)["parts"]


def text(*deltas, kind="text", id="t"):
    start, end = {"type": f"{kind}-start", "id": id}, {"type": f"{kind}-end", "id": id}
    return [start, *({"type": f"{kind}-delta", "id": id, "delta": delta} for delta in deltas), end]


def test_empty_stream():
    assert assemble([], message_id="m") == {"id": "m", "role": "assistant", "parts": []}


def test_text_and_reasoning():
    expected = [
        {"type": "reasoning", "id": "r", "text": "Hm", "state": "done"},
        {"type": "text", "text": "Hello", "state": "done"},
    ]
    assert parts(*text("H", "m", kind="reasoning", id="r"), *text("Hel", "lo")) == expected


def test_unfinished_text_is_streaming():
    assert parts(*text("a", "b")[:-1]) == [{"type": "text", "text": "ab", "state": "streaming"}]


def test_character_split_into_two_chunks():
    [part] = parts(*text("\ud83d", "\ude00"))
    assert part["text"] == "\N{GRINNING FACE}"


def test_text_after_the_end_of_its_step():
    chunks = [STEP, *text("a")[:-1], {"type": "finish-step"}, {"type": "text-delta", "id": "t", "delta": "b"}]
    assert [parts(*chunks, version=version)[1]["text"] for version in (5, 6, 7)] == ["a", "a", "ab"]


def test_metadata_is_merged_deeply():
    chunks = [
        {**START, "messageMetadata": {"usage": {"input": 1}, "tags": [1, 2]}},
        {"type": "message-metadata", "messageMetadata": {"usage": {"output": 2}}},
        {"type": "finish", "messageMetadata": {"tags": [3], "__proto__": {}}},
    ]
    assert assemble(chunks)["metadata"] == {"usage": {"input": 1, "output": 2}, "tags": [3]}
    assert chunks[0]["messageMetadata"] == {"usage": {"input": 1}, "tags": [1, 2]}


def test_data_is_replaced_by_id():
    chunks = [{"type": "data-x", "id": "1", "data": 1}, {"type": "data-x", "data": 2}, {"type": "data-y", "data": 3}]
    chunks += [{"type": "data-x", "id": "1", "data": 4}, {"type": "data-x", "data": 5, "transient": True}]
    assert [part["data"] for part in parts(*chunks)] == [4, 2, 3]
    assert chunks[0]["data"] == 1


@pytest.mark.parametrize(
    "chunk",
    [
        {"type": "file", "url": "u", "mediaType": "m"},
        {"type": "source-url", "sourceId": "s", "url": "u", "title": "t"},
        {"type": "source-document", "sourceId": "s", "mediaType": "m", "title": "t", "filename": "f"},
        {"type": "custom", "kind": "a.b", "providerMetadata": META},
        {"type": "reasoning-file", "url": "u", "mediaType": "m"},
        {"type": "steering-message", "id": "s", "parts": []},
    ],
)
def test_parts_of_one_chunk(chunk):
    assert parts({**chunk, "unknown": 1}) == [chunk]


def test_reset_of_a_step():
    chunks = [
        {"type": "data-x", "id": "1", "data": 1},
        STEP,
        CALL,
        *text("a"),
        {"type": "data-x", "id": "2", "data": 1},
    ]
    chunks.append({"type": "reset-step"})
    assert parts(*chunks) == [{"type": "data-x", "id": "1", "data": 1}, {"type": "step-start"}]
    again = [CALL, {"type": "data-x", "id": "2", "data": 2}]
    assert parts(*chunks, *again)[2:] == [CALL_PART, {"type": "data-x", "id": "2", "data": 2}]
    assert len(parts(*chunks, version=6)) == 5


def test_streamed_input():
    chunks = [
        {"type": "tool-input-start", "toolCallId": "c", "toolName": "find", "title": "Find"},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": '{"q": "a'},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": 'b", "n": tr'},
    ]
    part = {"type": "tool-find", "toolCallId": "c", "state": "input-streaming", "title": "Find"}
    assert parts(*chunks) == [{**part, "input": {"q": "ab", "n": True}, "rawInput": '{"q": "ab", "n": tr'}]
    assert parts(*chunks[:1]) == [part]
    done = parts(*chunks, {"type": "tool-output-available", "toolCallId": "c", "output": None})
    assert done == [{**part, "state": "output-available", "input": {"q": "ab", "n": True}, "output": None}]


@pytest.mark.parametrize("version", [5, 6, 7])
def test_results_of_calls(version):
    result = {"type": "tool-output-available", "toolCallId": "c", "output": 1, "preliminary": True}
    error = {"type": "tool-output-error", "toolCallId": "c", "errorText": "no"}
    output = {**CALL_PART, "state": "output-available", "output": 1, "preliminary": True}
    assert parts(CALL, result, version=version) == [output]
    assert parts(CALL, result, error, version=version) == [{**CALL_PART, "state": "output-error", "errorText": "no"}]


def test_invalid_input_of_a_call():
    error = {**CALL, "type": "tool-input-error", "errorText": "bad"}
    part = {"type": "tool-find", "toolCallId": "c", "state": "output-error", "errorText": "bad"}
    assert [parts(error, version=version) for version in (6, 7)] == [
        [{**part, "rawInput": {"q": 1}}],
        [{**part, "input": {"q": 1}}],
    ]


def test_dynamic_calls_have_a_name():
    [part] = parts({**CALL, "dynamic": True})
    assert (part["type"], part["toolName"]) == ("dynamic-tool", "find")


def test_approval():
    request = {"type": "tool-approval-request", "toolCallId": "c", "approvalId": "a", "reason": "costs"}
    response = {"type": "tool-approval-response", "approvalId": "a", "approved": False, "reason": "no"}
    states = [
        parts(CALL, request, *more)[0]
        for more in ([], [response], [response, {"type": "tool-output-denied", "toolCallId": "c"}])
    ]
    assert [part["state"] for part in states] == ["approval-requested", "approval-responded", "output-denied"]
    assert states[2]["approval"] == {"id": "a", "requestReason": "costs", "approved": False, "reason": "no"}
    assert parts(CALL, request, version=6)[0]["approval"] == {"id": "a"}
    assert parts(CALL, request, version=5) == [CALL_PART]


def test_another_message_id_begins_a_new_message():
    chunks = [START, *text("a"), {"type": "start"}, *text("b"), {**START, "messageId": "n"}, *text("c")]
    assert assemble(chunks) == {**assemble(text("c")), "id": "n"}


def test_continued_message():
    message = assemble([START, STEP, CALL, {"type": "tool-input-start", "toolCallId": "d", "toolName": "t"}])
    before = copy.deepcopy(message)
    result = {"type": "tool-output-available", "toolCallId": "c", "output": 1}
    delta = {"type": "tool-input-delta", "toolCallId": "d", "inputTextDelta": "[1"}
    continued = assemble([START, result, delta, STEP, *text("a")], message, message_id="unused")
    assert continued["id"] == "m"
    assert [part["type"] for part in continued["parts"]] == ["step-start", "tool-find", "tool-t", "step-start", "text"]
    assert (continued["parts"][1]["output"], continued["parts"][2]["input"]) == (1, [1])
    assert message == before


def test_message_of_the_user_is_not_continued():
    assert assemble([], {"id": "u", "role": "user", "parts": []}, message_id="m")["id"] == "m"


@pytest.mark.parametrize(
    "chunk",
    [
        {"type": "error", "errorText": "overloaded"},
        {"type": "text-delta", "id": "unknown", "delta": "a"},
        {"type": "text-end", "id": "unknown"},
        {"type": "tool-input-delta", "toolCallId": "unknown", "inputTextDelta": "a"},
        {"type": "tool-output-available", "toolCallId": "unknown", "output": 1},
        {"type": "tool-approval-response", "approvalId": "unknown", "approved": True},
        {"type": "text-start"},
        {"type": "text-start", "id": 1},
        {"type": ["text-start"]},
        {"id": "a"},
        [],
        None,
        "text",
    ],
)
def test_reading_stops(chunk):
    assert parts(*text("a"), chunk, *text("b")) == parts(*text("a"))


def test_unknown_types_are_ignored():
    assert parts(*text("a"), {"type": "future"}, {"type": "abort"}, *text("b")) == parts(*text("a"), *text("b"))


def test_none_counts_as_missing():
    assert parts({"type": "text-start", "id": "t", "providerMetadata": None}) == parts(
        {"type": "text-start", "id": "t"}
    )
    assert parts({**CALL, "input": None})[0]["input"] is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["a", "", "tool-a", "assistant", "output-error"]),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.sampled_from(["a", "id", "type"]), values),
    max_leaves=3,
)
TYPES = st.sampled_from([*_FIELDS, "data-a", "finish", "future"]) | JSON
CHUNKS = st.fixed_dictionaries({}, optional=dict.fromkeys([*_TYPES, "input", "output", "messageMetadata"], JSON))
GARBAGE = st.lists(st.builds(lambda chunk, type: {**chunk, "type": type}, CHUNKS, TYPES) | JSON, max_size=8)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "reasoning", "file", "data-a", "tool-a", "dynamic-tool", "step-start"]) | JSON},
    optional=dict.fromkeys(
        ["toolCallId", "toolName", "state", "rawInput", "input", "approval", "text", "id", "errorText", "output"], JSON
    ),
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant") | JSON, "parts": st.lists(PARTS | JSON, max_size=4) | JSON},
    optional={"id": JSON, "metadata": JSON},
)


@given(GARBAGE, MESSAGES | JSON, st.sampled_from([5, 6, 7]))
def test_malformed_input_does_not_raise(chunks, message, version):
    assembled = assemble(chunks, message, sdk_version=version)
    json.dumps(assembled)
    rebuilt = message_chunks(assembled, version)
    assert all(is_known(chunk["type"], version) and is_valid(chunk) for chunk in rebuilt)
    assemble(rebuilt, sdk_version=version)
    message_chunks(message, version)


def test_deeply_nested_input():
    text = "[" * 200_000
    chunks = [
        {"type": "tool-input-start", "toolCallId": "c", "toolName": "t"},
        {"type": "tool-input-delta", "toolCallId": "c", "inputTextDelta": text},
    ]
    [part] = parts(*chunks)
    assert part["rawInput"] == text
    assert "input" not in part


def test_rebuilt_call_with_an_input_too_deep_for_json():
    value = []
    for _ in range(200_000):
        value = [value]
    part = {**CALL_PART, "state": "output-error", "input": value, "errorText": "no"}
    assert message_chunks({"id": "m", "parts": [part]}) == [START]


def test_rebuilt_call_with_a_result_is_not_available_to_the_client_again():
    message = assemble([START, STEP, CALL, {"type": "tool-output-available", "toolCallId": "c", "output": 1}])
    chunks = message_chunks(message)
    assert [chunk["type"] for chunk in chunks[2:4]] == ["tool-input-start", "tool-input-delta"]
    assert assemble(chunks) == message


@pytest.mark.parametrize(
    ("version", "state"), [(5, "input-available"), (6, "input-available"), (7, "approval-responded")]
)
def test_rebuilt_response_to_an_approval(version, state):
    part = {**CALL_PART, "state": "approval-responded", "approval": {"id": "a", "approved": True}}
    [rebuilt] = assemble(message_chunks({"id": "m", "parts": [part]}, version), sdk_version=version)["parts"]
    assert rebuilt["state"] == state
    assert rebuilt.get("approval") == (part["approval"] if version == 7 else None)


def test_rebuilt_message_of_a_client_without_states():
    message = {
        "id": "m",
        "role": "assistant",
        "parts": [{"type": "text", "text": "a"}, {"type": "file", "filename": "f"}],
    }
    assert assemble(message_chunks(message))["parts"] == [{"type": "text", "text": "a", "state": "done"}]


@pytest.mark.parametrize(
    ("text", "value"),
    [("[1, tr", [1, True]), ('{"a": "x\\u00', {"a": "x"}), ('{"__proto__": 1}', ABSENT), ("NaN", ABSENT), ("", ABSENT)],
)
def test_partial_json(text, value):
    assert parse_partial_json(text) == value


def test_partial_json_of_older_readers():
    assert [parse_partial_json("[-", version) for version in (6, 7)] == [ABSENT, []]
    assert [parse_partial_json('"a\\u00', version) for version in (5, 6)] == [ABSENT, "a"]
