"""What stops a run that has gone wrong: values that are not finite, terms that drown the detection loss or do nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from kdcli.errors import GateError
from kdcli.options import TrainOptions

RATIO_RANGE = (0.01, 10.0)  # of a term's first value to the detection loss's: outside, the weight deserves a look
ZERO_STEPS = 50  # a term may be exactly 0 for so many active steps in a row


def require_finite(terms: Mapping[str, float], step: int) -> None:
    """Stop before the optimiser moves. Raises GateError with the step and every term."""
    if all(abs(v) < float("inf") for v in terms.values()):  # false for nan too
        return
    listed = ", ".join(f"{k}={v:.4g}" for k, v in terms.items())
    raise GateError(
        f"step {step}: the loss is not finite ({listed}); the weights were not changed. Lower the learning rate "
        "(--set optim.lr=...), lengthen the warm-up or clip the gradient (--set optim.clip=10)"
    )


def gradient_norms(parameters: list[nn.Parameter], terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the gradient of each term with respect to ``parameters``; keeps the graph."""
    norms = {}
    for name, term in terms.items():
        if not term.requires_grad:
            norms[name] = 0.0
            continue
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in gradients if g is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


def require_sane_gradients(
    norms: Mapping[str, float], detection: float, options: Mapping[str, str], limit: float
) -> list[str]:
    """Warnings for terms whose first gradient norm is more than the usual limit times the detection loss's, ``detection``.

    Raises GateError for one above ``limit`` times it, unless that is 0: it ruins students silently. ``options``: the
    ``--set`` key that scales each term.
    """
    warnings = []
    for name, norm in norms.items():
        found = (
            f"{name}: its first gradient norm is {norm:.3g}, {norm / max(detection, 1e-12):.0f} times that of the "
            f"detection loss ({detection:.3g})"
        )
        if limit and not norm <= limit * detection:  # true for nan too
            raise GateError(
                f"{found}, the limit is {limit:g}; lower its weight (--set {options[name]}=...), or allow it with "
                "--gradient-limit 0 (published weights can need it on a student trained from scratch)"
            )
        if norm > TrainOptions.gradient_limit * detection:
            warnings.append(f"warning: {found}; --gradient-limit {limit:g} allows it")
    return warnings


def unusual_values(values: Mapping[str, float], detection: float, dense: Collection[str]) -> list[str]:
    """Warnings for terms whose first value lies outside RATIO_RANGE times the detection loss, ``detection``.

    ``dense``: the terms that may be too small as well; sparse ones start small by design (LD weighs by the student's own
    score).
    """
    warnings = []
    for name, value in values.items():
        ratio = value / max(detection, 1e-12)
        if not (RATIO_RANGE[0] if name in dense else 0.0) <= ratio <= RATIO_RANGE[1]:
            warnings.append(
                f"warning: {name} starts at {value:.3g}, {ratio:.2g} times the detection loss ({detection:.3g}); usual is "
                f"{RATIO_RANGE[0]} to {RATIO_RANGE[1]}"
            )
    return warnings


class ZeroGuard:
    """Stops a run whose distillation term is exactly 0 for long, although its region was not empty."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def check(self, terms: Mapping[str, float], active: Mapping[str, bool], step: int) -> None:
        """Count one step. Raises GateError after ZERO_STEPS active zeros in a row."""
        for name, value in terms.items():
            if not active[name]:
                continue
            self.counts[name] = 0 if value != 0 else self.counts.get(name, 0) + 1
            if self.counts[name] >= ZERO_STEPS:
                raise GateError(
                    f"step {step}: {name} was exactly 0 for {ZERO_STEPS} steps although its region was not empty; "
                    "the distillation does nothing. Check the teacher and the method's options"
                )
