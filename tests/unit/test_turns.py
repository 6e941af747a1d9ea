"""The pure functions for the turns of a chat: positions of questions and answers, and messages for the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aibind_postgres import ChatHistory, StreamStatus, WebError, _turns
from aibind_postgres._turns import Position, Question, model_messages, text_answer, unanswered
from aibind_postgres.models import chunk_text

DONE, STOPPED, ERROR = StreamStatus("done", None, 1), StreamStatus("stopped", None, 1), StreamStatus("error", "x", 1)
FOLLOW = Position()


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def ask(chat, prompt, position, stream_id):
    return _turns.ask(chat, stream_id, prompt=prompt, position=position)


def answer(chat, question, text, status):
    return _turns.answer(chat, question, text_answer(question, [chunk_text(text)]), status)


def turn(chat, prompt, text="answer", status=DONE, position=FOLLOW):
    """Add a question and its answer. The stream id is the prompt, with a number if it is taken."""
    stream_id = f"{prompt} {len(chat)}"
    question = ask(chat, prompt, position, stream_id)
    answer(chat, question, text, status)
    return question


def contents(chat):
    return [message["content"] for message in chat.messages]


def test_turns_follow_each_other():
    chat = ChatHistory()
    first = turn(chat, "one", "1")
    second = turn(chat, "two", "2")
    assert contents(chat) == ["one", "1", "two", "2"]
    assert chat.node_ids == [first.id, first.stream_id, second.id, second.stream_id]
    assert chat.tree.get(first.id).metadata == {"streamId": first.stream_id}
    assert chat.tree.get(first.stream_id).metadata == {}


@pytest.mark.parametrize(("status", "state"), [(STOPPED, "stopped"), (ERROR, "error"), (None, "deleted")])
def test_incomplete_answer_has_its_state_and_is_on_the_path(status, state):
    chat = ChatHistory()
    question = turn(chat, "one", "1", status)
    assert chat.tree.get(question.stream_id).metadata == {"state": state}
    turn(chat, "two")
    assert contents(chat) == ["one", "1", "two", "answer"]


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize("status", [STOPPED, ERROR, None])
def test_question_of_a_failed_turn_becomes_an_alternative_to_the_next_one(text, status):
    chat = ChatHistory()
    turn(chat, "zero")
    failed = turn(chat, "one", text, status)
    assert contents(chat) == ["zero", "answer", "one"]
    next_one = turn(chat, "two", "2")
    assert contents(chat) == ["zero", "answer", "two", "2"]
    siblings, index = chat.tree.siblings(next_one.id)
    assert ([sibling.id for sibling in siblings], index) == ([failed.id, next_one.id], 1)


def test_failed_first_question_becomes_an_alternative_root():
    chat = ChatHistory()
    turn(chat, "one", "", ERROR)
    turn(chat, "two", "2")
    assert contents(chat) == ["two", "2"]
    assert len(chat.tree.root_ids) == 2


def test_done_answer_without_text_is_stored_and_not_continued():
    chat = ChatHistory()
    question = turn(chat, "one", "", DONE)
    assert contents(chat) == ["one", ""]
    turn(chat, "two", "2")
    assert contents(chat) == ["two", "2"]
    assert question.stream_id in chat.tree


def test_messages_of_the_application_are_continued():
    chat = ChatHistory()
    chat.append(user("a file"))
    turn(chat, "one", "1")
    assert contents(chat) == ["a file", "one", "1"]
    chat.append("plain text")
    turn(chat, "two", "2")
    assert chat.messages[3:] == ["plain text", user("two"), model("2")]


def test_parent_id_makes_a_branch():
    chat = ChatHistory()
    first = turn(chat, "one", "1")
    second = turn(chat, "two", "2")
    turn(chat, "instead", "3", position=Position(first.stream_id, True))
    assert contents(chat) == ["one", "1", "instead", "3"]
    turn(chat, "new", "4", position=Position(None, True))
    assert contents(chat) == ["new", "4"]
    # A question follows the answer to its parent, not the parent itself.
    turn(chat, "after two", "5", position=Position(second.id, True))
    assert contents(chat) == ["one", "1", "two", "2", "after two", "5"]


def test_regenerate_adds_an_answer_to_the_last_or_the_given_question():
    chat = ChatHistory()
    first = turn(chat, "one", "1")
    turn(chat, "two", "2")
    again = ask(chat, "", Position(regenerate=True), "again")
    assert again.message == user("two")
    assert contents(chat) == ["one", "1", "two"]
    answer(chat, again, "2b", DONE)
    assert contents(chat) == ["one", "1", "two", "2b"]
    assert chat.alternative_count("again") == 2
    assert chat.tree.get(again.id).metadata == {"streamId": "again"}
    other = ask(chat, "", Position(first.id, True, True), "other")
    assert (other.id, contents(chat)) == (first.id, ["one"])


@pytest.mark.parametrize("text", ["", " "])
def test_failed_regeneration_keeps_the_earlier_answer(text):
    chat = ChatHistory()
    turn(chat, "one", "1")
    turn(chat, "two", "2")
    before = contents(chat)
    again = ask(chat, "", Position(regenerate=True), "again")
    assert answer(chat, again, text, ERROR) is True
    assert contents(chat) == before
    # The next question follows the earlier answer, also before the failure is recorded.
    ask(chat, "", Position(regenerate=True), "lost")
    turn(chat, "three", "3")
    assert contents(chat) == [*before, "three", "3"]


def test_state_of_a_stream_that_could_not_be_ended_is_error():
    chat = ChatHistory()
    question = ask(chat, "one", FOLLOW, "s")
    answer(chat, question, "1", StreamStatus("active", None, 1))
    assert chat.tree.get("s").metadata == {"state": "error"}


@pytest.mark.parametrize("regenerate", [False, True])
def test_invalid_parent_raises(regenerate):
    chat = ChatHistory()
    first = turn(chat, "one", "1")
    before = chat.to_json()
    positions = [Position("missing", True, regenerate)]
    if regenerate:
        positions += [Position(first.stream_id, True, True), Position(None, True, True)]
    for position in positions:
        with pytest.raises(WebError) as caught:
            ask(chat, "two", position, "s")
        assert caught.value.status == 400
    assert chat.to_json() == before
    with pytest.raises(WebError):
        ask(ChatHistory(), "", Position(regenerate=True), "s")


def test_answer_is_added_once():
    chat = ChatHistory()
    question = turn(chat, "one", "1")
    assert answer(chat, question, "another text", ERROR) is False
    assert contents(chat) == ["one", "1"]


def test_answer_moves_only_the_path_of_its_question():
    chat = ChatHistory()
    slow = ask(chat, "slow", FOLLOW, "slow stream")
    turn(chat, "fast", "1")
    assert answer(chat, slow, "2", DONE)
    assert contents(chat) == ["fast", "1"]
    assert chat.tree.path_to("slow stream").messages == [user("slow"), model("2")]


def test_answer_to_a_removed_question_follows_the_summary():
    chat = ChatHistory()
    question = ask(chat, "one", FOLLOW, "s")
    chat.compact(system("summary"))
    assert answer(chat, question, "1", DONE)
    assert contents(chat) == ["summary", "one", "1"]


def test_unanswered_questions():
    chat = ChatHistory()
    assert unanswered(chat) == []
    question = ask(chat, "one", FOLLOW, "s")
    assert unanswered(chat) == [question] == [Question(question.id, user("one"), "s")]
    answer(chat, question, "1", DONE)
    assert unanswered(chat) == []
    again = ask(chat, "", Position(regenerate=True), "t")
    other = ask(chat, "other", Position(None, True), "u")
    chat.append(user("of the application"))
    assert unanswered(chat) == [again, other]
    for number in range(30):
        ask(chat, "more", Position(None, True), f"more {number}")
    assert [each.stream_id for each in unanswered(chat)] == [f"more {number}" for number in range(10, 30)]


def test_model_messages_begin_with_a_user_and_include_all_system_messages():
    path = [system("summary"), user("1"), model("2"), user("3"), system("note"), model("4"), user("5")]
    assert model_messages(path, None) == path
    assert model_messages(path, 4) == path
    assert model_messages(path, 3) == [system("summary"), user("3"), system("note"), model("4"), user("5")]
    assert model_messages(path, 2) == model_messages(path, 3)
    assert model_messages(path, 1) == [system("summary"), system("note"), user("5")]
    assert model_messages(["no", "roles", user("5")], 2) == [user("5")]


TURNS = st.lists(
    st.tuples(
        st.sampled_from(["follow", "regenerate", "branch", "root"]),
        st.sampled_from(["", "text"]),
        st.sampled_from([DONE, STOPPED, ERROR, None]),
        st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=12,
)


@given(TURNS, st.one_of(st.none(), st.integers(1, 5)))
def test_roles_alternate_after_any_turns(turns, max_messages):
    """The roles of the messages for the model alternate, and none is blank, for turns with any outcome."""
    chat, pending = ChatHistory(), []
    for number, (kind, text, status, choice, ends) in enumerate(turns):
        nodes = list(chat.tree.serialize()["nodes"])
        position = FOLLOW
        if kind == "root":
            position = Position(None, True)
        elif kind == "branch" and nodes:
            position = Position(nodes[choice % len(nodes)], True)
        elif kind == "regenerate":
            questions = [each for each in nodes if chat.tree.get(each).message["role"] == "user"]
            position = Position(questions[choice % len(questions)], True, True) if questions else FOLLOW
        question = ask(chat, f"question {number}", position, f"stream {number}")
        got = model_messages(chat.messages, max_messages)
        assert [message["role"] for message in got] == ["user", "assistant"] * (len(got) // 2) + ["user"]
        assert all(message["content"] for message in got)
        pending.append((question, text, status))
        if ends:
            for each in pending:
                answer(chat, *each)
            pending.clear()
