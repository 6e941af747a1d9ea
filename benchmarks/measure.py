"""Measuring: contestants take turns, each round gives one figure per contestant, and rows compare medians."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, TypeAlias

TOKEN = " token"  # appended where the text does not matter

Figures: TypeAlias = dict[str, float]

UNITS = {"rate": "/s", "p50": "ms", "p99": "ms", "growth": "MiB"}


class Missing(NamedTuple):
    """A peer that is not available."""

    reason: str


class Bar(NamedTuple):
    """Target of a row: for the ratio if it has a peer, else for the figure itself."""

    value: float
    at_most: bool

    def __str__(self) -> str:
        value = f"1/{1 / self.value:.0f}" if self.value <= 0.25 else f"{self.value:g}"
        return f"{'≤' if self.at_most else '≥'} {value}"

    def is_reached(self, value: float) -> bool:
        return value <= self.value if self.at_most else value >= self.value


def at_least(value: float) -> Bar:
    return Bar(value, at_most=False)


def at_most(value: float) -> Bar:
    return Bar(value, at_most=True)


@dataclass
class Results:
    """Figures of one contestant, with one value per round. Empty if it is missing, with the reason."""

    figures: dict[str, list[float]] = field(default_factory=dict)
    missing: str = ""

    def add(self, figures: Figures) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)


@dataclass(frozen=True)
class Row:
    """One line of the table: our figures of all rounds, alone or with those of a peer."""

    work: str
    unit: str = ""
    ours: Sequence[float] = ()
    peer: str = ""
    theirs: Sequence[float] = ()
    bar: Bar | None = None
    note: str = ""  # reason why figures are missing

    @property
    def ratio(self) -> float | None:
        """Median of the ratios of the rounds. A disturbance affects both sides of a round."""
        if not (self.ours and self.theirs):
            return None
        return median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def is_reached(self) -> bool | None:
        if self.bar is None or self.note:
            return None
        ratio = self.ratio
        return self.bar.is_reached(median(self.ours) if ratio is None else ratio)


def compare(work: str, figure: str, ours: Results, peer: str, theirs: Results, bar: Bar | None = None) -> Row:
    """Return the row that compares one of our figures with the same figure of a peer."""
    measured = ours.figures[figure]
    return Row(work, UNITS[figure], measured, peer, theirs.figures.get(figure, ()), bar, theirs.missing)


def take_turns(
    rounds: int, contestants: dict[str, Callable[[], Figures] | Missing], step: Callable[[str], None]
) -> dict[str, Results]:
    """Run each contestant once per round: A B C, A B C, …, so that a changing load affects all of them."""
    results = {
        name: Results(missing=contestant.reason if isinstance(contestant, Missing) else "")
        for name, contestant in contestants.items()
    }
    for number in range(rounds):
        for name, contestant in contestants.items():
            if not isinstance(contestant, Missing):
                step(f"round {number + 1} of {rounds}: {name}")
                results[name].add(contestant())
    return results


def quantile(values: Iterable[float], share: float) -> float:
    """Return the quantile of the values for a share between 0 and 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def latencies(seconds: Sequence[float]) -> Figures:
    """Return the median and the 99th percentile of durations, in milliseconds."""
    return {"p50": quantile(seconds, 0.5) * 1e3, "p99": quantile(seconds, 0.99) * 1e3}
