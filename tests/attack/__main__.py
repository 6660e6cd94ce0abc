"""``python -m tests.attack KIND --cases N --seed S --out FOLDER``: attack the commands, and count what fails."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests.attack.campaign import KINDS, campaign, only, table

    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "all", "table"])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="results, and the world; /dev/shm is fast")
    parser.add_argument("--only", type=int, help="run this number alone, say everything, and leave its files")
    given = parser.parse_args()
    if given.kind == "table":
        print(table(given.out))
        sys.exit(0)
    if given.only is not None:
        sys.exit(only(given.kind, given.seed, given.only, given.out))
    sys.exit(campaign(given.kind, given.cases, given.seed, given.out))
