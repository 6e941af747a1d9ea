"""Import time of one flavour of the package in addition to `psycopg` and `psycopg_pool`: medians over new processes.

Usage, with the package installed: `python benchmarks/import_cost.py [ROUNDS]`. The target is 15 ms.
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

BASE = "import psycopg, psycopg_pool"
OURS = "from aibind_postgres import PostgresConversationStore, PostgresStreamStore, StreamHandler"
STATEMENTS = {"base": BASE, "ours": f"{BASE}; {OURS}"}

MEASURE = """
from time import perf_counter
start = perf_counter()
{statement}
print((perf_counter() - start) * 1000)
"""


def measure(statement: str) -> float:
    """Return the milliseconds of an import in a new process."""
    command = [sys.executable, "-c", MEASURE.format(statement=statement)]
    # Bytecode is written, since pip installs packages with bytecode.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return float(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 30
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for number in range(rounds + 1):
        for name, statement in STATEMENTS.items():
            elapsed = measure(statement)
            if number:  # the first round warms the file cache and writes bytecode
                times[name].append(elapsed)
    for name, statement in STATEMENTS.items():
        print(f"{median(times[name]):7.1f} ms  {statement}")
    difference = median(ours - base for base, ours in zip(times["base"], times["ours"], strict=True))
    print(f"{difference:7.1f} ms  difference, median of the rounds")


if __name__ == "__main__":
    main()
