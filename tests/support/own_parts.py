"""A detector and a method of a user's own: the examples of docs/extending.md."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "extending"
MY_DETECTOR, MY_METHOD = EXAMPLES / "my_detector.py", EXAMPLES / "my_method.py"
