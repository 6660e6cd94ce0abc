"""Makes faster_rules.npz with mmdet 3.3.0, mmengine 0.10.7 and mmcv-lite 2.1.0 (no compiler needed; all Apache-2.0).

    python tests/detectors/mmdet_cases/make_faster_rules.py     # from the repository's root

mmcv's NMS and RoIAlign are replaced by torchvision's. Samplers draw everything, so that no random number is in a result.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.support import mmdet_faster as given

ALL = 10**6  # a sampler of this size draws every candidate


class RoIAlign(nn.Module):
    """mmcv.ops.RoIAlign with its defaults."""

    def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int = 0, aligned: bool = True) -> None:
        super().__init__()
        self.output_size = (output_size, output_size)
        self.rule = (spatial_scale, sampling_ratio, aligned)

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        return torchvision.ops.roi_align(x, rois, self.output_size, *self.rule)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: dict[str, Any]) -> tuple[Tensor, Tensor]:
    keep = torchvision.ops.batched_nms(boxes, scores, idxs, nms_cfg["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


def replace_ops() -> None:
    """mmcv-lite has no compiled ops; what is not replaced is an empty class that nothing here builds."""

    def absent(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            return importlib.machinery.ModuleSpec(name, self) if name.startswith("mmcv.ops.") else None  # type: ignore[arg-type]

        def create_module(self, spec: Any) -> types.ModuleType:
            module = types.ModuleType(spec.name)
            module.__getattr__ = lambda name: getattr(sys.modules["mmcv.ops"], name)  # type: ignore[method-assign]
            return module

        def exec_module(self, module: types.ModuleType) -> None:
            pass

    ops: Any = types.ModuleType("mmcv.ops")
    ops.__path__, ops.RoIAlign, ops.batched_nms, ops.__getattr__ = [], RoIAlign, batched_nms, absent
    sys.modules["mmcv.ops"] = ops
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]


replace_ops()
import mmdet  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

CONFIG = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"


def model_of(config: Config, channels: int, width: int) -> Any:
    """The config's detector on a ResNet-18, made small; nothing else is changed."""
    model = config.model.copy()
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.update(in_channels=[64, 128, 256, 512], out_channels=channels)
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    model.roi_head.bbox_roi_extractor.out_channels = channels
    model.roi_head.bbox_head.update(in_channels=channels, fc_out_channels=width, num_classes=given.CLASSES)
    return MODELS.build(model)


def levels(value: Tensor) -> list[Tensor]:
    """[B, P, C] -> [B, C, h, w] of each level."""
    parts = torch.split(value, [h * w for h, w in given.SHAPES], dim=1)
    return [p.mT.reshape(len(value), -1, h, w) for p, (h, w) in zip(parts, given.SHAPES, strict=True)]


def samples(chosen: list[int]) -> list[DetDataSample]:
    found = []
    for image in chosen:
        height, width = given.CONTENT[image]
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        shapes = {"img_shape": (height, width), "pad_shape": padded, "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo={**shapes, "batch_input_shape": given.CANVAS.size})
        truth = {"bboxes": given.boxes()[image], "labels": given.labels()[image]}
        sample.gt_instances = InstanceData(**truth)
        found.append(sample)
    return found


def losses(model: Any, chosen: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(terms, gradients) of the images ``chosen``, all four as TwoStageDetector.loss computes them."""
    logits, deltas = (v[chosen].clone().requires_grad_() for v in given.rpn_outputs())
    features = given.features()[chosen].clone().requires_grad_()
    cells = len(chosen), given.CELLS
    scores, shifts = levels(logits.reshape(*cells, -1)), levels(deltas.reshape(*cells, -1))
    data = samples(chosen)
    truth, metas = [s.gt_instances for s in data], [s.metainfo for s in data]
    objects = [InstanceData(bboxes=t.bboxes, labels=torch.zeros_like(t.labels)) for t in truth]
    terms = {k: sum(v) for k, v in model.rpn_head.loss_by_feat(scores, shifts, objects, metas).items()}
    with torch.no_grad():
        rule = model.train_cfg.rpn_proposal
        proposals = model.rpn_head.predict_by_feat(scores, shifts, batch_img_metas=metas, cfg=rule)
    roi = model.roi_head.loss(levels(features), proposals, data)
    terms |= {k: roi[k] for k in ("loss_cls", "loss_bbox")}
    model.roi_head.zero_grad()
    sum(terms.values()).backward()
    head = model.roi_head.bbox_head
    return terms, {
        "logits": logits.grad,
        "deltas": deltas.grad,
        "features": features.grad,
        "fc_reg": head.fc_reg.weight.grad,
    }


def equal_logits(rpn_head: Any, data: list[DetDataSample]) -> Tensor:
    """``loss_rpn_cls`` where every logit is 0."""
    scores = [torch.zeros(len(data), given.ANCHORS, *shape) for shape in given.SHAPES]
    shifts = [torch.zeros(len(data), 4 * given.ANCHORS, *shape) for shape in given.SHAPES]
    truth = [InstanceData(bboxes=s.gt_instances.bboxes, labels=0 * s.gt_instances.labels) for s in data]
    return sum(rpn_head.loss_by_feat(scores, shifts, truth, [s.metainfo for s in data])["loss_rpn_cls"])


def main() -> None:
    register_all_modules()
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / CONFIG)
    settings = {k: config.model[k].to_dict() for k in ("rpn_head", "train_cfg", "test_cfg", "roi_head")}
    settings["optimizer"] = config.optim_wrapper.to_dict()
    out: dict[str, Any] = {}

    torch.manual_seed(0)
    fresh = model_of(config, channels=64, width=256)
    fresh.init_weights()
    parts = {k: p.detach() for k, p in fresh.named_parameters() if not k.startswith("backbone")}
    out["init"] = json.dumps({name: [float(p.std()), float(p.abs().max())] for name, p in parts.items()})
    for name, chosen in (("2", [2]), ("02", [0, 2])):  # equal logits: 256 samples cost the same, whichever they are
        out[f"loss_equal_{name}"] = equal_logits(fresh.rpn_head, samples(chosen))

    config.model.train_cfg.rpn.sampler.num = config.model.train_cfg.rcnn.sampler.num = ALL
    model = model_of(config, given.CHANNELS, given.WIDTH).eval()
    print(model.roi_head.bbox_head.load_state_dict(given.head()))

    logits, deltas = (v.reshape(len(v), given.CELLS, -1) for v in given.rpn_outputs())
    scores, shifts, data = levels(logits), levels(deltas), samples([0, 1, 2])
    metas = [s.metainfo for s in data]
    with torch.no_grad():
        for name, rule in (("train", model.train_cfg.rpn_proposal), ("test", model.test_cfg.rpn)):
            found = model.rpn_head.predict_by_feat(scores, shifts, batch_img_metas=metas, cfg=rule)
            for k, image in enumerate(found):
                out[f"{name}_boxes_{k}"], out[f"{name}_scores_{k}"] = image.bboxes, image.scores
        detected = model.roi_head.predict(levels(given.features()), found, data, rescale=False)
        for k, image in enumerate(detected):
            out |= {f"boxes_{k}": image.bboxes, f"scores_{k}": image.scores, f"labels_{k}": image.labels.to(torch.int8)}
        out["pooled"] = model.roi_head.bbox_roi_extractor(levels(given.features())[:4], given.rois())[:, :2]
        out["roi_levels"] = model.roi_head.bbox_roi_extractor.map_roi_levels(given.rois(), 4)

    anchors, valid = model.rpn_head.get_anchors(given.SHAPES, metas, device="cpu")
    for k, image in enumerate(data):
        usable = torch.cat(valid[k])
        priors = InstanceData(priors=torch.cat(anchors[k])[usable])
        result = model.rpn_head.assigner.assign(priors, image.gt_instances)
        owner = torch.full((len(usable),), -9, dtype=torch.int8)
        owner[usable] = result.gt_inds.to(torch.int8)  # 0 background, -1 ignored, 1.. the box; -9: not looked at
        out[f"owner_{k}"] = owner
    for name, chosen in (("all", [0, 1, 2]), ("0", [0]), ("1", [1]), ("2", [2])):
        terms, gradients = losses(model, chosen)
        out |= {f"loss_{name}_{k}": v for k, v in terms.items()}
        if name == "all":
            out |= {f"grad_{k}": v.flatten()[::7] for k, v in gradients.items()}
    out["settings"] = json.dumps(settings)
    arrays = {k: v.detach().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in out.items()}
    for k, v in arrays.items():
        print(k, v.shape, v if v.ndim == 0 and v.dtype.kind == "f" else "")
    np.savez_compressed(Path(__file__).parent / "faster_rules.npz", **arrays)


if __name__ == "__main__":
    main()
