"""Registers every command; each lives in the module of its kind."""

from __future__ import annotations

from kdcli.cli import cache, cache_edit, cache_teacher, compare, convert, data, demo, evaluate, listing, train

__all__ = ["cache", "cache_edit", "cache_teacher", "compare", "convert", "data", "demo", "evaluate", "listing", "train"]
