"""The one JSON object of ``--json``."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """The one JSON object of ``--json``, on stdout."""
    # JSON escapes every control character but this one, which a terminal drops
    sys.stdout.write(json.dumps(value, indent=1).replace("\x7f", "\\u007f") + "\n")
