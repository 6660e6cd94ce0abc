"""The approximations of a distilled run, which every table and report of it names."""

from __future__ import annotations

from kdcli.engine.teacher.binding import BoundTeacher
from kdcli.methods.base import APPROXIMATION
from kdcli.store.encodings import FLOAT32

EXACT = "fp32"


def approximations(teacher: BoundTeacher, live_precision: str) -> list[str]:
    """What lies between the paper's loss on a float32 teacher and this run, each as a few words; empty for nothing.

    Methods that approximate another by design, a teacher below float32 (``live_precision`` is that of one in memory), and
    the encodings of what the methods read of a store.
    """
    found = [f"method {name}" for name, method in teacher.methods.items() if method.offline == APPROXIMATION]
    reader = teacher.source.reader
    precision = live_precision if reader is None else reader.manifest.teacher_run.precision
    if precision != EXACT:
        found.append(f"teacher in {precision}")
    if reader is not None:
        read = reader.schema.restrict(sorted({n for method in teacher.methods.values() for n in method.needs}))
        names = {t.encoding.to_json()["name"] for t in read if t.encoding != FLOAT32}
        if names:
            found.append(f"stored as {', '.join(sorted(names))}")
    return found
