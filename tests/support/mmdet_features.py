"""Files of mmdet detectors whose head kdcli does not have: made-up weights under mmdet's names."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.mmdet_case import weights


def cascade_mask() -> dict[str, Tensor]:
    """A Cascade Mask R-CNN on ResNet-18: backbone, neck and RPN of the recorded Faster R-CNN, three box heads, masks."""
    state = {}
    for key, value in weights("faster_rcnn").items():
        if key.startswith("roi_head.bbox_head."):
            for stage in range(3):
                state[key.replace("bbox_head.", f"bbox_head.{stage}.")] = value
        else:
            state[key] = value
    return state | {"roi_head.mask_head.0.conv_logits.weight": torch.zeros(3, 256, 1, 1)}


def reppoints() -> dict[str, Tensor]:
    """A RepPoints on ResNet-50, whose P6 reads C5: backbone and neck of the recorded RetinaNet."""
    state = {k: v for k, v in weights("retinanet_caffe").items() if not k.startswith("bbox_head.")}
    return state | {"bbox_head.reppoints_cls_conv.weight": torch.zeros(64, 64, 3, 3)}


def gflv2() -> dict[str, Tensor]:
    """A GFLv2 on ResNet-18, whose P6 reads P5: the recorded GFL and a part of its head that GFL does not have."""
    return {**weights("gfl"), "bbox_head.reg_conf.0.weight": torch.zeros(64, 20, 1, 1)}


def deformable(state: dict[str, Tensor], outputs: int) -> dict[str, Tensor]:
    """``state``, on a ResNet with bottlenecks, with deformable convolutions in stages 2 to 4."""
    made = dict(state)
    for key, value in state.items():
        if key.endswith("conv2.weight") and key.split(".")[1] in ("layer2", "layer3", "layer4"):
            made[key.replace("conv2.weight", "conv2.conv_offset.weight")] = torch.zeros(outputs, value.shape[0], 3, 3)
            made[key.replace("conv2.weight", "conv2.conv_offset.bias")] = torch.zeros(outputs)
    return made
