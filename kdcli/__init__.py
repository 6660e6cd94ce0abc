"""kdcli: distillation of object detectors from an offline teacher cache."""

__version__ = "0.1.0"
