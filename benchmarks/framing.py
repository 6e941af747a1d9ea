"""The time to turn an answer of a model into the bytes for its clients, by wire format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aibind_postgres.wire import Wire, ai_sdk, aibind

from .measure import Row, Target, at_least

if TYPE_CHECKING:
    from .bench import Bench

CHUNKS = 200  # of one answer
TEXT = "thirty characters of an answer"


def framing(bench: Bench) -> list[Row]:
    """Frame an answer, and encode and frame it, by both wire formats in turn."""
    wires: dict[str, Wire] = {"AI SDK": ai_sdk.WIRE, "aibind": aibind.WIRE}
    operations: dict[str, Callable[[], object]] = {}
    for name, wire in wires.items():
        operations[f"{name}, frame"] = frame_answer(wire)
        operations[f"{name}, both"] = encode_and_frame_answer(wire)
    found = bench.alternate(operations)

    def row(work: str, operation: str, target: Target | None = None) -> Row:
        # `alternate` measures milliseconds for each answer.
        ours, theirs = (
            [CHUNKS * 1e3 / duration for duration in found[f"{name}, {operation}"].figures["p50"]] for name in wires
        )
        return Row(f"AI SDK, {len(TEXT)} characters: {work}", "/s", ours, "wire format of aibind", theirs, target)

    return [
        row("frame a chunk", "frame", at_least(0.9)),
        row("encode a token and frame its chunk", "both"),
    ]


def frame_answer(wire: Wire) -> Callable[[], None]:
    """Return the work for one reader of an answer: the frame of each stored chunk."""
    encoder = wire.chunk_encoder("answer")
    encoder.encode(TEXT)  # begins the message and its text
    [chunk] = encoder.encode(TEXT)

    def frame() -> None:
        frames = wire.frame_encoder("answer", 0)
        for seq in range(1, CHUNKS + 1):
            frames.frame(seq, chunk)

    return frame


def encode_and_frame_answer(wire: Wire) -> Callable[[], None]:
    """Return the work for the producer and one reader of an answer."""

    def encode_and_frame() -> None:
        encoder, frames = wire.chunk_encoder("answer"), wire.frame_encoder("answer", 0)
        seq = 0
        for _ in range(CHUNKS):
            for chunk in encoder.encode(TEXT):
                seq += 1
                frames.frame(seq, chunk)

    return encode_and_frame
