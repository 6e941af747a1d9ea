"""The buffer of a stream writer: limits, batches, and texts that are sent again unchanged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aibind_postgres._write_buffer import WriteBuffer

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
        st.tuples(st.sampled_from(["send", "lose", "confirm"]), st.none()),
    ),
    max_size=60,
)


def filled(texts: list[str], max_chunks: int = 1000, max_bytes: int = 1000) -> WriteBuffer:
    buffer = WriteBuffer(max_chunks, max_bytes)
    for text in texts:
        assert buffer.add(text)
    return buffer


def test_empty_buffer() -> None:
    buffer = WriteBuffer(1, 1)
    assert (len(buffer), buffer.durable, buffer.last) == (0, 0, 0)
    assert buffer.next_batch() == []


@pytest.mark.parametrize(
    ("max_chunks", "max_bytes", "texts"),
    [(2, 1000, ["", ""]), (1000, 10, ["äöx", "äöx"]), (1000, 9, ["12345", "1234"])],
)
def test_full_buffer_refuses_a_chunk(max_chunks: int, max_bytes: int, texts: list[str]) -> None:
    buffer = filled(texts, max_chunks, max_bytes)
    assert not buffer.add("x")
    assert buffer.next_batch() == texts
    buffer.confirm(len(texts))
    assert buffer.add("x")


def test_empty_buffer_accepts_a_chunk_of_any_size() -> None:
    buffer = WriteBuffer(1, 1)
    assert buffer.add("x" * 100)
    assert not buffer.add("")


def test_numbers_follow_the_durable_chunk() -> None:
    buffer = WriteBuffer(1000, 1000)
    buffer.durable = 7
    assert buffer.add("a")
    assert buffer.add("b")
    assert buffer.last == 9
    buffer.next_batch()
    assert (buffer.durable, buffer.last) == (7, 9)
    buffer.confirm(9)
    assert (buffer.durable, buffer.last, len(buffer)) == (9, 9, 0)


def test_texts_in_doubt_are_sent_again_unchanged() -> None:
    buffer = filled(["a", "b"])
    assert buffer.next_batch() == ["a", "b"]
    assert buffer.add("c")
    assert buffer.next_batch() == ["a", "b"]
    buffer.confirm(2)
    assert buffer.next_batch() == ["c"]


def test_batch_is_not_changed_by_later_calls() -> None:
    buffer = filled(["a"])
    batch = buffer.next_batch()
    assert buffer.add("b")
    buffer.confirm(1)
    assert batch == ["a"]


@given(STEPS, st.integers(1, 5), st.integers(1, 12))
def test_every_accepted_text_is_stored_once_and_in_order(
    steps: list[tuple[str, str | None]], max_chunks: int, max_bytes: int
) -> None:
    """Simulate a writer whose server may lose the request or the reply of a statement."""
    buffer = WriteBuffer(max_chunks, max_bytes)
    accepted: list[str] = []
    stored: list[str] = []
    in_doubt: list[str] = []

    def send() -> list[str]:
        batch = list(buffer.next_batch())
        if in_doubt:
            assert batch == in_doubt
        if stored[buffer.durable : buffer.durable + len(batch)] != batch:  # `expected_seq` makes a repeat harmless
            assert len(stored) == buffer.durable
            stored.extend(batch)
        return batch

    for step, text in steps:
        if text is not None:
            fits = not len(buffer) or (
                len(buffer) < max_chunks
                and sum(len(item.encode()) for item in [*accepted[buffer.durable :], text]) <= max_bytes
            )
            assert buffer.add(text) == fits
            if fits:
                accepted.append(text)
        elif step == "send":  # the reply is lost
            in_doubt = send()
        elif step == "lose":  # the request is lost
            in_doubt = list(buffer.next_batch())
        else:
            batch = send()
            buffer.confirm(buffer.durable + len(batch))
            in_doubt = []
        assert buffer.last == len(accepted)
        assert len(buffer) == len(accepted) - buffer.durable
        assert stored == accepted[: len(stored)]
    while len(buffer):
        buffer.confirm(buffer.durable + len(send()))
        in_doubt = []
    assert stored == accepted
