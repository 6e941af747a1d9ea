"""Measuring: variants run interleaved, each round gives one figure per variant, and rows compare medians."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, TypeAlias

TOKEN = " token"  # appended where the text does not matter

Figures: TypeAlias = dict[str, float]

UNITS = {"rate": "/s", "processor": "µs", "p50": "ms", "p99": "ms", "growth": "MiB"}


class Missing(NamedTuple):
    """A peer that is not available."""

    reason: str


class Target(NamedTuple):
    """The target of a row: for the ratio if it has a peer, else for the figure itself."""

    value: float
    at_most: bool

    def __str__(self) -> str:
        value = f"1/{1 / self.value:.0f}" if self.value <= 0.25 else f"{self.value:g}"
        return f"{'≤' if self.at_most else '≥'} {value}"

    def is_met(self, value: float) -> bool:
        return value <= self.value if self.at_most else value >= self.value


def at_least(value: float) -> Target:
    return Target(value, at_most=False)


def at_most(value: float) -> Target:
    return Target(value, at_most=True)


@dataclass
class Results:
    """Figures of one variant, with one value per round. Empty if it is missing, with the reason."""

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
    target: Target | None = None
    note: str = ""  # reason why figures are missing

    @property
    def ratio(self) -> float | None:
        """Median of the ratios of the rounds. A disturbance affects both sides of a round."""
        if not (self.ours and self.theirs and all(self.theirs)):
            return None
        return median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def is_met(self) -> bool | None:
        if self.target is None or self.note:
            return None
        ratio = self.ratio
        return self.target.is_met(median(self.ours) if ratio is None else ratio)


def compare(work: str, figure: str, ours: Results, peer: str, theirs: Results, target: Target | None = None) -> Row:
    """Return the row that compares one of our figures with the same figure of a peer."""
    measured = ours.figures[figure]
    return Row(work, UNITS[figure], measured, peer, theirs.figures.get(figure, ()), target, theirs.missing)


def run_interleaved(
    rounds: int, variants: dict[str, Callable[[], Figures] | Missing], step: Callable[[str], None]
) -> dict[str, Results]:
    """Run each variant once per round: A B C, A B C, …, so that a changing load affects all of them."""
    results = {
        name: Results(missing=variant.reason if isinstance(variant, Missing) else "")
        for name, variant in variants.items()
    }
    for number in range(rounds):
        for name, variant in variants.items():
            if not isinstance(variant, Missing):
                step(f"round {number + 1} of {rounds}: {name}")
                results[name].add(variant())
    return results


def quantile(values: Iterable[float], share: float) -> float:
    """Return the quantile of the values for a share between 0 and 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def latencies(seconds: Sequence[float]) -> Figures:
    """Return the median and the 99th percentile of durations, in milliseconds."""
    return {"p50": quantile(seconds, 0.5) * 1e3, "p99": quantile(seconds, 0.99) * 1e3}
