"""The class list of a converted checkpoint: names from the file, ids from COCO or from an annotation file."""

from __future__ import annotations

from kdcli.classes import Category, ClassList
from kdcli.detectors.convert.coco import COCO_CLASSES
from kdcli.errors import OptionError

WHERE = "--classes coco or --data D"


def class_list(outputs: int, names: list[str] | None, given: ClassList | None, source: str) -> ClassList:
    """The ``outputs`` classes, in their order.

    names: as the file has them, None if it does not. given: the classes that the user named by ``source`` (a flag), in
    the order of their ids. With both, the names give the order and ``given`` the ids. Names alone get COCO's ids if they
    are COCO's 80, else 1, 2, ... Raises OptionError when numbers or names differ, or there are neither.
    """
    if names is not None and len(names) != outputs:
        raise OptionError(f"the file names {len(names)} classes for {outputs} outputs")
    if given is not None and len(given) != outputs:
        raise OptionError(f"{source}: {len(given)} classes, the model has {outputs}; name what it was trained on")
    if given is None and names is None:
        raise OptionError(f"the file does not name its {outputs} classes; give them with {WHERE}")
    if names is None:
        assert given is not None
        return given
    if len(set(names)) != len(names):
        raise OptionError("the file names a class twice, so that names do not tell its outputs apart")
    if given is None:
        same = names == COCO_CLASSES.names
        return COCO_CLASSES if same else ClassList.numbered(names)
    ids = {c.name: c.id for c in given}
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise OptionError(f"{source}: has no class {', '.join(repr(n) for n in unknown[:3])}, which the file names")
    return ClassList(Category(ids[name], name) for name in names)
