"""How long ``kdcli --help`` takes, against a process that imports typer and does nothing: what every command starts with.

Prints one JSON object. Both are started in turn, round by round, so that a busy machine disturbs both.

    python benchmarks/startup.py [--rounds 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from common import machine, pairwise

COMMANDS = {"help": ["-m", "kdcli", "--help"], "typer": ["-c", "import typer"]}


def seconds(arguments: list[str]) -> float:
    """From the start of a process to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds + 1):
        for name, arguments in COMMANDS.items():
            taken[name].append(seconds(arguments))
    for times in taken.values():
        times.pop(0)  # its files were not in memory yet
    found = {f"{name}_s": round(statistics.median(times), 3) for name, times in taken.items()}
    print(
        json.dumps({**found, "help_over_typer": pairwise(taken["help"], taken["typer"], None), **machine()}, indent=1)
    )


if __name__ == "__main__":
    main()
