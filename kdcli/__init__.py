"""kdcli: distillation of object detectors from an offline teacher cache.

The names below are the Python surface (docs/python-api.md). Each is imported when it is first asked for: ``import kdcli``
alone loads neither torch nor zarr, and the command's help answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "Detector",
    "GateError",
    "KDError",
    "Losses",
    "Method",
    "MissingPathError",
    "Need",
    "NoSpaceError",
    "OptionError",
    "Store",
    "StoreError",
    "StoreView",
    "StoredRows",
    "TeacherBatch",
    "UsageError",
    "WorkerError",
    "__version__",
    "cache_teacher",
    "distill",
    "evaluate",
    "load_detector",
    "losses",
    "open_store",
    "train",
]

if TYPE_CHECKING:
    from kdcli.api.batch import StoredRows, TeacherBatch
    from kdcli.api.caching import cache_teacher
    from kdcli.api.evaluation import evaluate
    from kdcli.api.losses import Losses, losses
    from kdcli.api.runs import distill, train
    from kdcli.api.store import Store, open_store
    from kdcli.api.view import StoreView
    from kdcli.detectors.base import Detector
    from kdcli.detectors.weights import load_detector
    from kdcli.errors import (
        DataError,
        GateError,
        KDError,
        MissingPathError,
        NoSpaceError,
        OptionError,
        StoreError,
        UsageError,
        WorkerError,
    )
    from kdcli.methods.base import Method
    from kdcli.tensors import Need
else:
    _MODULES = {
        "kdcli.api.batch": ("StoredRows", "TeacherBatch"),
        "kdcli.api.caching": ("cache_teacher",),
        "kdcli.api.evaluation": ("evaluate",),
        "kdcli.api.losses": ("Losses", "losses"),
        "kdcli.api.runs": ("distill", "train"),
        "kdcli.api.store": ("Store", "open_store"),
        "kdcli.api.view": ("StoreView",),
        "kdcli.detectors.base": ("Detector",),
        "kdcli.detectors.weights": ("load_detector",),
        "kdcli.methods.base": ("Method",),
        "kdcli.tensors": ("Need",),
    }
    _HOME = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'kdcli' has no attribute '{name}'")
        from importlib import import_module

        value = getattr(import_module(_HOME.get(name, "kdcli.errors")), name)
        globals()[name] = value  # asked for once
        return value

    def __dir__():
        return sorted(__all__)
