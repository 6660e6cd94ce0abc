"""DeFeat: Distilling Object Detectors via Decoupled Features (CVPR 2021, arXiv 2103.14475).

Neck features imitate the teacher's, foreground and background apart, each by its own count and weight. The background
carries the larger weight, so DeFeat has a dense store. Two parts are off by default: backbone stages in the same way,
and the RoI head's classes on the teacher's proposals. Numbers are those of the official code (ggjy/DeFeat.pytorch)
and, for COCO, of its author.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdcli.errors import OptionError
from kdcli.geometry.defeat_mask import defeat_cells, stage_cells
from kdcli.methods.base import Method, Pair
from kdcli.methods.decoupled import adapt, adapter, decoupled_imitation, neck_adapters
from kdcli.methods.divergence import kl_rows, squared_rows
from kdcli.methods.maps import MAPS
from kdcli.structures import Batch
from kdcli.tensors import (
    BACKBONE,
    PROPOSAL_BOXES,
    PROPOSAL_LABELS,
    PROPOSAL_LOGITS,
    Need,
    Region,
    Tensors,
    level_of_per,
    world_mean,
)

STAGES = tuple(Need(name, Region.ALL) for name in BACKBONE[2:])  # c4 and c5: what the author found best on COCO
PROPOSALS = (Need(PROPOSAL_BOXES, Region.PROPOSALS), Need(PROPOSAL_LOGITS, Region.PROPOSALS))

WEIGHT_OPTIONS = {
    "object": "fg_weight",
    "background": "bg_weight",
    "cls_object": "obj_cls_weight",
    "cls_background": "bg_cls_weight",
}


class DeFeat(Method):
    """Imitation of neck features, decoupled into foreground and background; on request of backbone stages and classes.

    Options: ``fg_weight``, ``bg_weight`` of the neck's two terms: 4 and 16 are the author's on COCO, 3 and 12 on VOC.
    ``backbone_weight`` multiplies both for the same loss on the stages c4 and c5; 0 leaves the backbone out.
    ``obj_cls_weight``, ``bg_cls_weight``, ``obj_temperature``, ``bg_temperature``: the RoI head's classes on positive
    and negative proposals of the teacher (two-stage detectors only; 0 leaves them out, the released value is 2).
    A 3x3 convolution for each level maps student features to the teacher's, also when the channels agree; it is trained,
    and left behind at export.
    """

    title = "Distilling Object Detectors via Decoupled Features (DeFeat), CVPR 2021, arXiv 2103.14475"
    evidence = "paper's abstract, official code and its author's answers; weights off Faster R-CNN are ours"
    offline = "exact, dense"
    needs: tuple[Need, ...] = (MAPS,)
    index_aligned = False

    def __init__(
        self,
        pair: Pair,
        *,
        fg_weight: float = 4.0,
        bg_weight: float = 16.0,
        backbone_weight: float = 0.0,
        obj_cls_weight: float = 0.0,
        bg_cls_weight: float = 0.0,
        obj_temperature: float = 1.0,
        bg_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.grid = pair.grid
        self.needs = _needs(fg_weight, bg_weight, backbone_weight, obj_cls_weight, bg_cls_weight)
        for need in self.needs:
            _require(need.name, pair)
        self.weights = {"object": fg_weight, "background": bg_weight}
        self.backbone_weight = backbone_weight
        self.cls_weights = {"object": obj_cls_weight, "background": bg_cls_weight}
        self.temperatures = (obj_temperature, bg_temperature)
        self.adapters = neck_adapters(pair) if MAPS in self.needs else nn.ModuleList()
        self.stages = [need for need in STAGES if need in self.needs]
        levels = [level_of_per(pair.student[need.name].per) for need in self.stages]
        self.stage_levels = [level for level in levels if level is not None]
        self.stage_adapters = nn.ModuleList(
            nn.Sequential(adapter(pair.student[need.name].dims[0], pair.teacher[need.name].dims[0]), nn.ReLU())
            for need in self.stages
        )
        self.num_classes = pair.student[PROPOSAL_LOGITS].dims[0] - 1 if PROPOSALS[1] in self.needs else 0

    @classmethod
    def reads(cls, options: Mapping[str, Any]) -> tuple[Need, ...]:
        """Neck maps, backbone stages and proposals, each only when a term of some weight reads it."""
        names = ("fg_weight", "bg_weight", "backbone_weight", "obj_cls_weight", "bg_cls_weight")
        return _needs(*(options[name] for name in names))

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``object`` and ``background`` of the neck; ``backbone_...`` and ``cls_...`` likewise; none of weight 0."""
        terms: dict[str, Tensor] = {}
        boxes = pad_sequence(batch.targets.boxes, batch_first=True)  # [B, G, 4]; padding has no area
        if MAPS in self.needs:
            _add(terms, "", self.weights, self._neck(student[MAPS.key], teacher[MAPS.key], boxes, batch))
        if self.stages:
            weights = {part: self.backbone_weight * weight for part, weight in self.weights.items()}
            _add(terms, "backbone_", weights, self._backbone(student, teacher, boxes, batch))
        if PROPOSALS[1] in self.needs:
            logits = student[PROPOSALS[1].key], teacher[PROPOSALS[1].key]
            parts = decoupled_kl(*logits, teacher[PROPOSAL_LABELS], self.num_classes, *self.temperatures)
            _add(terms, "cls_", self.cls_weights, parts)
        return terms

    def _neck(self, student: Tensor, teacher: Tensor, boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        canvas, valid = batch.targets.canvas, batch.targets.valid
        shapes = self.grid.level_shapes(canvas)
        adapted = adapt(student, self.adapters, shapes, valid)
        error = squared_rows(adapted, teacher)
        inside = defeat_cells(boxes, self.grid, canvas)
        return decoupled_imitation(
            *(self.grid.split_levels(part, batch.targets.canvas) for part in (error, inside, valid))
        )

    def _backbone(self, student: Tensors, teacher: Tensors, boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        canvas = batch.targets.canvas
        shapes = self.grid.level_shapes(canvas)
        valid = self.grid.split_levels(batch.targets.valid, batch.targets.canvas)
        errors, insides, valids = [], [], []
        for i, (need, level) in enumerate(zip(self.stages, self.stage_levels, strict=True)):
            adapted = adapt(student[need.key], self.stage_adapters[i : i + 1], [shapes[level]], valid[level])
            errors.append(squared_rows(adapted, teacher[need.key]))
            insides.append(stage_cells(boxes, self.grid, canvas, level))
            valids.append(valid[level])
        return decoupled_imitation(errors, insides, valids)

    def weight_option(self, part: str) -> str:
        """Each term has its own, but for the two of the backbone."""
        if part.startswith("backbone_"):
            return "backbone_weight"
        return WEIGHT_OPTIONS[part]

    def active(self, batch: Batch, part: str) -> bool:
        """There is always background; a foreground needs a box."""
        return part.endswith("background") or any(len(boxes) for boxes in batch.targets.boxes)


def decoupled_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, background: int, obj_temperature: float, bg_temperature: float
) -> tuple[Tensor, Tensor]:
    """(positives, negatives): T^2 * KL(teacher || student), summed over classes, the mean of the proposals of that kind.

    ``student``, ``teacher``: logits [S, K + 1] of the same proposals; ``labels`` [S], ``background`` for a negative.
    arXiv 2103.14475. Counts are of the global batch. Without proposals of a kind: 0.
    """
    negative = labels == background
    width = student.shape[-1]  # kl_rows is a mean over classes

    def part(chosen: Tensor, temperature: float) -> Tensor:
        rows = kl_rows(student, teacher, temperature) * width
        return (rows * chosen).sum() / world_mean(chosen.sum().float(), least=1)

    return part(~negative, obj_temperature), part(negative, bg_temperature)


def _needs(fg: float, bg: float, backbone: float, obj_cls: float, bg_cls: float) -> tuple[Need, ...]:
    features = bool(fg or bg)
    return (
        *((MAPS,) if features else ()),
        *(STAGES if features and backbone else ()),
        *(PROPOSALS if obj_cls or bg_cls else ()),
    )


def _require(name: str, pair: Pair) -> None:
    """Raise OptionError when a net lacks the tensor, or gives it with another stride."""
    for side, specs in (("student", pair.student), ("teacher", pair.teacher)):
        if name not in specs:
            part = "obj_cls_weight and bg_cls_weight are" if name.startswith("proposals/") else "backbone_weight is"
            raise OptionError(
                f"defeat needs {name}, which the {side} does not give: {part} not for this detector; set 0"
            )
    if pair.student[name].per != pair.teacher[name].per:
        raise OptionError(f"defeat compares {name} cell by cell: the strides of student and teacher differ")


def _add(terms: dict[str, Tensor], prefix: str, weights: Mapping[str, float], parts: tuple[Tensor, Tensor]) -> None:
    for (part, weight), value in zip(weights.items(), parts, strict=True):
        if weight:
            terms[prefix + part] = weight * value
