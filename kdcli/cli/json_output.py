"""The one JSON object of ``--json``."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """The one JSON object of ``--json``, on stdout."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")
