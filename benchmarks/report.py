"""Output: the table, the JSON file, the picture and the page. `python -m benchmarks.report` writes the page."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.table import Table

from .measure import Row, Target

HEADINGS = ["work", "ours", "peer", "peer's figure", "ratio", "target", "met"]
PACKAGES = [
    "aibind-postgres",
    "psycopg",
    "psycopg-pool",
    "redis",
    "hiredis",
    "starlette",
    "uvicorn",
    "httptools",
    "uvloop",
]

PAGE = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).parent / "results.svg"
RESULTS = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)

# Readable on white and on black.
TEXT, MET, MISSED, NEUTRAL = "#808080", "#3a87c8", "#d2691e", "#9a9a9a"

LESS_IS_BETTER = ("ms", "µs", "MiB", "bytes", "statements/s")


def figure(value: float, unit: str) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:,.{digits}f}"
    return f"{text}{unit}" if unit == "/s" else f"{text} {unit}".rstrip()


def cells(row: Row) -> list[str]:
    """Return one line of the table, in the order of the headings."""
    ours = figure(median(row.ours), row.unit) if row.ours else ""
    theirs = figure(median(row.theirs), row.unit) if row.theirs else row.note
    ratio = "" if row.ratio is None else f"1/{1 / row.ratio:,.1f}" if 0 < row.ratio <= 0.25 else f"{row.ratio:.3g}"
    met = {None: "", True: "yes", False: "NO"}[row.is_met]
    return [row.work, ours, row.peer, theirs, ratio, str(row.target or ""), met]


def table(rows: Iterable[Row]) -> Table:
    """Return the table for a terminal."""
    result = Table(*HEADINGS)
    for row in rows:
        style = {None: "", True: "green", False: "red"}[row.is_met]
        *others, met = cells(row)
        result.add_row(*others, f"[{style}]{met}[/]" if style else met)
    return result


def markdown(rows: Iterable[Row]) -> str:
    """Return the table as Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(postgres: str, redis_server: str) -> dict[str, Any]:
    """Return the versions of all software, and the machine."""
    versions = {"python": platform.python_version(), "postgresql": postgres, "redis-server": redis_server}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"cores": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()}
    return {"versions": versions, "machine": machine}


def as_json(rows: Iterable[Row], about: dict[str, Any]) -> str:
    """Return the figures of all rounds with medians and ratios."""
    listed = []
    for row in rows:
        medians = {
            "ours_median": median(row.ours) if row.ours else None,
            "theirs_median": median(row.theirs) if row.theirs else None,
        }
        target = row.target._asdict() if row.target else None
        listed.append({**asdict(row), "target": target, **medians, "ratio": row.ratio, "met": row.is_met})
    return json.dumps({**about, "rows": listed}, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> tuple[list[Row], dict[str, Any]]:
    """Return the arguments of the `as_json` call that made this text."""
    about = json.loads(text)
    rows = []
    for item in about.pop("rows"):
        measured = {name: item[name] for name in ("work", "unit", "ours", "peer", "theirs", "note")}
        rows.append(Row(**measured, target=Target(**item["target"]) if item["target"] else None))
    return rows, about


def draw(rows: Iterable[Row], file: Path) -> None:
    """Draw the ratio to each peer, with a line at the target."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [(row, row.ratio) for row in rows if row.ratio is not None]
    drawing, axes = plt.subplots(figsize=(13, 1.0 + 0.3 * len(shown)), layout="constrained")
    for index, (row, ratio) in enumerate(shown):
        exponent = -1 if row.unit in LESS_IS_BETTER else 1
        color = {None: NEUTRAL, True: MET, False: MISSED}[row.is_met]
        axes.barh(index, ratio**exponent - 1, left=1, height=0.66, color=color)
        if row.target is not None:
            axes.plot([row.target.value**exponent] * 2, [index - 0.45, index + 0.45], color=TEXT, linewidth=2)
        measured = f"{figure(median(row.ours), row.unit)} : {figure(median(row.theirs), row.unit)}"
        axes.annotate(
            measured, (1.01, index), xycoords=("axes fraction", "data"), va="center", color=TEXT, annotation_clip=False
        )
    axes.axvline(1, color=TEXT, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), [f"{row.work} vs. {row.peer}" for row, _ in shown])
    axes.invert_yaxis()
    axes.tick_params(colors=TEXT, which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.margins(y=0.01)
    drawing.suptitle(
        "Ratio to each peer, inverted where less is better: above 1 is better. The line is the target. Blue: met. "
        "Orange: not met.",
        x=0.01,
        ha="left",
        color=TEXT,
    )
    drawing.savefig(file, transparent=True, metadata={"Date": None} if file.suffix == ".svg" else None)


def main(results: Path) -> None:
    """Write the table of a JSON file of results to benchmarks/README.md, and the picture next to it."""
    rows, about = from_json(results.read_text("utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    machine = about["machine"]
    conditions = f"{machine['cores']} cores, {machine['system']} on {machine['architecture']}; {versions}."
    PAGE.write_text(RESULTS.sub(lambda _: f"{conditions}\n\n{markdown(rows)}\n", PAGE.read_text("utf-8")), "utf-8")
    draw(rows, PICTURE)


if __name__ == "__main__":
    typer.run(main)
