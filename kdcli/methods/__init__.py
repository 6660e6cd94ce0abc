"""The distillation methods, one file each. Adding one = that file + one line here."""

from __future__ import annotations

from kdcli.methods.base import Method
from kdcli.methods.bckd import BCKD
from kdcli.methods.cwd import CWD
from kdcli.methods.defeat import DeFeat
from kdcli.methods.defeat_thin import DeFeatThin
from kdcli.methods.drkd import DRKD, DRKDLite
from kdcli.methods.fgd import FGD
from kdcli.methods.ld import LD
from kdcli.methods.pfi import PFI
from kdcli.methods.pkd import PKD
from kdcli.methods.rm import RM

METHODS: dict[str, type[Method]] = {
    "ld": LD,
    "rm": RM,
    "pfi": PFI,
    "defeat": DeFeat,
    "defeat_thin": DeFeatThin,
    "bckd": BCKD,
    "drkd": DRKD,
    "drkd_lite": DRKDLite,
    "cwd": CWD,
    "pkd": PKD,
    "fgd": FGD,
}
