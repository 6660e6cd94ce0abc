"""mmdet's names of weights as ours, and the check that a detector gets all of them and no other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcli.detectors.base import Detector
from kdcli.detectors.soundness import require_same_kinds
from kdcli.errors import OptionError

SHOWN = 5  # names in an error

# mmdet's names -> ours, the first pattern that fits the whole name; \g<last> is weight, bias or a statistic
_LAST = r"(?P<last>\w+)"
_BACKBONE_NAMES = (
    (
        rf"backbone\.(?P<path>.+)\.conv2_offset\.{_LAST}",
        r"backbone.\g<path>.conv2.conv_offset.\g<last>",
    ),  # before mmdet 2
    (r"backbone\.(?P<path>.+)", r"backbone.\g<path>"),
)
_DENSE_NAMES = (
    *_BACKBONE_NAMES,
    (rf"neck\.lateral_convs\.([012])\.conv\.{_LAST}", r"neck.lateral.\1.\g<last>"),
    (rf"neck\.fpn_convs\.([012])\.conv\.{_LAST}", r"neck.output.\1.\g<last>"),
    (rf"neck\.fpn_convs\.3\.conv\.{_LAST}", r"neck.p6.\g<last>"),
    (rf"neck\.fpn_convs\.4\.conv\.{_LAST}", r"neck.p7.\g<last>"),
    (rf"bbox_head\.(?:gfl|atss|retina|conv|fcos)_cls\.{_LAST}", r"head.cls.\g<last>"),
    (rf"bbox_head\.(?:gfl|atss|retina|conv|fcos)_reg\.{_LAST}", r"head.box.\g<last>"),
    (rf"bbox_head\.(?:atss|conv|fcos)_centerness\.{_LAST}", r"head.centerness.\g<last>"),
)
_TWO_STAGE_NAMES = (
    *_BACKBONE_NAMES,
    (rf"neck\.lateral_convs\.(\d)\.conv\.{_LAST}", r"neck.inner_blocks.\1.0.\g<last>"),
    (rf"neck\.fpn_convs\.(\d)\.conv\.{_LAST}", r"neck.layer_blocks.\1.0.\g<last>"),
    (rf"rpn_head\.rpn_conv\.{_LAST}", r"rpn.conv.0.0.\g<last>"),
    (rf"rpn_head\.rpn_cls\.{_LAST}", r"rpn.cls_logits.\g<last>"),
    (rf"rpn_head\.rpn_reg\.{_LAST}", r"rpn.bbox_pred.\g<last>"),
    (rf"roi_head\.bbox_head\.shared_fcs\.0\.{_LAST}", r"roi.body.fc6.\g<last>"),
    (rf"roi_head\.bbox_head\.shared_fcs\.1\.{_LAST}", r"roi.body.fc7.\g<last>"),
    (rf"roi_head\.bbox_head\.fc_cls\.{_LAST}", r"roi.cls.\g<last>"),
    (rf"roi_head\.bbox_head\.fc_reg\.{_LAST}", r"roi.box.\g<last>"),
)
_TOWER = re.compile(rf"bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.{_LAST}")
_SCALE = re.compile(r"bbox_head\.scales\.(\d+)\.scale")


def renamed(weights: Mapping[str, Tensor], *, two_stage: bool) -> dict[str, Tensor]:
    """``weights`` under our names. Raises OptionError that lists the names that mmdet's plain models do not have."""
    normed = any(_TOWER.fullmatch(key) and ".gn." in key for key in weights)
    state, unknown, scales = {}, [], {}
    for key, value in weights.items():
        tower, scale = _TOWER.fullmatch(key), _SCALE.fullmatch(key)
        if scale and not two_stage and value.numel() == 1 and value.is_floating_point():
            scales[int(scale[1])] = value.reshape(())
        elif tower and not two_stage:
            place = int(tower[2]) * (3 if normed else 2) + (tower[3] == "gn")  # conv, norm if any, relu
            state[f"head.{'box' if tower[1] == 'reg' else 'cls'}_tower.{place}.{tower['last']}"] = value
        elif (ours := _rename(key, _TWO_STAGE_NAMES if two_stage else _DENSE_NAMES)) is not None:
            state[ours] = value
        else:
            unknown.append(key)
    if unknown:
        raise OptionError(f"weights that kdcli has no place for: {some(unknown)}; only plain models can be converted")
    if scales:
        state["head.scales"] = torch.stack([scales[k] for k in sorted(scales)])
    return state


def _rename(key: str, names: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in names:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return None


def fill(detector: Detector, state: dict[str, Tensor], *, unbiased: bool) -> None:
    """Load ``state``; with ``unbiased`` the convs of the towers may lack a bias, which then is 0.

    Raises OptionError listing what is missing, too much or of another shape, under our names.
    """
    towers = {f"{name}.bias" for name, m in detector.named_modules() if "_tower." in name and isinstance(m, nn.Conv2d)}
    own = detector.state_dict()
    for key in own.keys() - state.keys():
        # batch norms of before PyTorch 0.4.1, and of stripped files, do not count their batches
        if key.endswith("num_batches_tracked") or (unbiased and key in towers):
            state[key] = torch.zeros_like(own[key])
    problems = {
        "missing": own.keys() - state.keys(),
        "too many": state.keys() - own.keys(),
        "of another shape": {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape},
    }
    said = [f"{kind}: {some(sorted(keys))}" for kind, keys in problems.items() if keys]
    if said:
        raise OptionError(f"weights of {detector.spec.name} do not fit: {'; '.join(said)}")
    require_same_kinds(own, state, f"weights of {detector.spec.name}")
    detector.load_state_dict(state, strict=True)


def some(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
