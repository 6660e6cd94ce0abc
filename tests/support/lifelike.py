"""A teacher with random weights whose outputs are spread as a trained one's, and images with no, one and 300 boxes.

A detector with fresh weights gives features of 0.003 and, without group norm, scores that lie within one step of an
8-bit code of each other; with its last layers enlarged, scores far outside the range of such a code, and FCOS boxes
without area. What an encoding costs can be measured on neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.classes import ClassList
from kdcli.data.coco import open_split
from kdcli.data.images import read_image
from kdcli.data.shapes import make_shapes
from kdcli.data.views import orient, render, view_geometry
from kdcli.detectors.base import Detector
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.two_stage.detector import TwoStageDetector
from kdcli.detectors.weights import export
from kdcli.files import atomic_save
from kdcli.structures import Canvas
from kdcli.tensors import BOX_DISTRIBUTION
from tests.support.small_runs import CLASSES

Layer = nn.Conv2d | nn.Linear

SMALL, LARGE = Canvas(64, 96), Canvas(192, 256)
CROWD = 300  # boxes

# mean and standard deviation of what a layer gives: class logits mostly between -9 and 3, as a trained teacher's
SCORES = (-4.0, 2.0)
FEATURES = (0.0, 1.0)
EDGES = (0.0, 2.0)
# delta in the coding of RetinaNet and of ATSS: an anchor moves and grows by a fifth; distance in strides: never 0
BOXES = {"retinanet": (0.0, 0.2), "atss": (0.0, 1.0), "fcos": (3.0, 0.5)}
RPN_DELTAS = (0.0, 0.2)


def make_crowd(root: Path) -> Path:
    """A data set of nine images of 64 to 96 pixels: the first has no box, the second one, the third 300."""
    make_shapes(root, num_train=9, num_val=2, seed=4, size=(64, 96))
    file = root / "annotations" / "train.json"
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    generator = np.random.default_rng(0)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    chosen = {1: 0, 2: 1, 3: CROWD}
    boxes = [
        (a["image_id"], a["category_id"], a["bbox"]) for a in content["annotations"] if a["image_id"] not in chosen
    ]
    for image, count in chosen.items():
        for k in range(count):
            side = generator.integers(3, 31, 2)
            corner = generator.integers(0, np.array(sizes[image]) - side + 1)
            boxes.append((image, k % len(CLASSES) + 1, [*corner.tolist(), *side.tolist()]))
    content["annotations"] = [
        {"id": k + 1, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for k, (image, label, box) in enumerate(boxes)
    ]
    file.write_text(json.dumps(content), "utf-8")
    return root


def lifelike_teacher(path: Path, data: Path, detector: str, *, seed: int = 11) -> Path:
    """A checkpoint of ``detector`` (``+distribution`` for LD's box branch), scaled on the images of ``data`` at LARGE."""
    torch.manual_seed(seed)
    name, _, box = detector.partition("+")
    table: dict[str, Any] = {"fpn_channels": 48, "tower_convs": 1, "head_channels": 32, "box": box or "default"}
    model = build_detector(ModelSpec(name, "mobilenet_v3_small", len(CLASSES), **table))
    _settle(model, _pixels(data))
    atomic_save(export(model, ClassList.numbered(CLASSES), str(LARGE), {}), path)
    return path


def _pixels(data: Path) -> Tensor:
    """The training images of ``data`` that lie as LARGE does, [B, 3, H, W] in 0..1."""
    dataset = open_split(data, "train")
    found = []
    for i in range(dataset.num_images):
        if orient(LARGE, *dataset.image_size(i)) == LARGE:
            geometry = view_geometry(LARGE, *dataset.image_size(i), "identity", 0, dataset.image_id(i))
            image, _ = read_image(dataset.image_path(i), (geometry.height, geometry.width))
            found.append(render(image, geometry))
    return torch.stack(found).float() / 255


@torch.no_grad()
def _settle(model: Detector, images: Tensor) -> None:
    """Give batch norm the statistics of ``images``, and the last layers the spread of a trained detector."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of what it sees
    model.train()(images)
    model.eval()
    if isinstance(model, TwoStageDetector):
        _spread(model, images, {model.rpn.cls_logits: SCORES, model.rpn.bbox_pred: RPN_DELTAS, model.roi.cls: EDGES})
        return
    assert isinstance(model, DenseDetector)
    maps = dict.fromkeys((*model.neck.output, model.neck.p6, model.neck.p7), FEATURES)
    box = EDGES if model.box_name == BOX_DISTRIBUTION else BOXES[model.spec.detector]
    _spread(model, images, {**maps, model.head.cls: SCORES, model.head.box: box})


def _spread(model: Detector, images: Tensor, wanted: Mapping[Layer, tuple[float, float]]) -> None:
    """Scale weights and shift biases until what each layer gives has the wanted mean and standard deviation."""
    for layer, (mean, deviation) in wanted.items():
        assert layer.bias is not None
        layer.bias.zero_()
        found: list[Tensor] = []
        with layer.register_forward_hook(lambda _, __, output, found=found: found.append(output.flatten())):
            outputs = model(images)
            if isinstance(model, TwoStageDetector):
                content = torch.tensor([LARGE.size] * len(images))
                model.proposal_logits(outputs, model.proposals(outputs, content, LARGE), LARGE)
        values = torch.cat(found)
        factor = deviation / values.std()
        layer.weight.mul_(factor)
        layer.bias.fill_(mean - float(values.mean() * factor))
