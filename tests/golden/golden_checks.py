"""One check for each kind of reference file; a new kind is one more function in ``CHECKS``."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from golden_bckd import check_bckd_cls, check_bckd_loc
from golden_bckd_head import check_bckd_head
from golden_case import (
    ANCHOR_GRID,
    ATSS,
    LEVELS,
    MAX_IOU,
    RETINA_GRID,
    Case,
    assert_near,
    canvas_of,
    check_losses,
    content_of,
    flat,
    images,
    leaves,
    make_targets,
)
from golden_defeat import check_defeat_cls, check_defeat_inputs, check_defeat_neck
from golden_fcos import check_fcos, check_fcosplus
from golden_ld import check_general_instances, check_ld_mmdet3, check_ld_repo
from torch import Tensor

from kdcli.detectors.dense.decode import candidates, decode
from kdcli.detectors.dense.losses import atss_loss, gather_positives, gfl_loss, retinanet_loss
from kdcli.geometry.assign import assign
from kdcli.geometry.boxes import encode_deltas, pairwise_diou_official, pairwise_iou
from kdcli.geometry.derive import decode_distribution, integral
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec, compute_entries, fine_grained_cells, vlr_weights
from kdcli.methods.divergence import kl_rows
from kdcli.structures import IGNORED, VLR, Canvas, Targets

NUM_CLASSES = 20


def check_anchors(case: Case) -> None:
    """Anchors, base anchors, FCOS points and valid cells."""
    canvas = canvas_of(case.file("inputs_student"))
    points = Grid(offset=0.5)
    ours = {
        "anchors": ANCHOR_GRID.anchors(canvas).split(ANCHOR_GRID.level_sizes(canvas)),
        "retina_anchors": RETINA_GRID.anchors(canvas).split(RETINA_GRID.level_sizes(canvas)),
        "fcos_points": points.centers(canvas).split(points.level_sizes(canvas)),
    }
    # the first cell lies at (0, 0), so its anchors are the base anchors
    ours["base_anchor"] = [level[:1] for level in ours["anchors"]]
    ours["retina_base_anchors"] = [level[: RETINA_GRID.num_anchors] for level in ours["retina_anchors"]]
    for key, golden in case.arrays.items():
        if key.endswith("_valid"):
            assert torch.equal(ANCHOR_GRID.valid(canvas, content_of(case, key[: -len("_valid")])), golden.bool()), key
        else:
            name, level = key.rsplit("_l", 1)
            assert_near(ours[name][int(level)], golden, key)


def check_kl(case: Case) -> None:
    """KL with temperature: rows, mean, weighted mean and with the loss weight."""
    tags = [key[: -len("_pred")] for key in case.arrays if key.endswith("_pred")]
    assert tags
    for tag in tags:
        g = {key[len(tag) + 1 :]: value for key, value in case.arrays.items() if key.startswith(f"{tag}_")}
        pred = g["pred"].clone().requires_grad_()
        rows = kl_rows(pred, g["soft_label"], float(g["T"]))
        assert_near(rows, g["loss_none"], f"{tag} rows")
        weighted = (rows * g["weight"]).sum() / g["avg_factor"]
        for form, loss in (
            ("mean", rows.mean()),
            ("weighted", weighted),
            ("module", weighted * g["loss_weight"]),
        ):
            assert_near(loss.reshape(1), g[f"loss_{form}"], f"{tag} {form}")
            (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
            assert_near(gradient, g[f"grad_{form}"], f"{tag} gradient of {form}")


def check_targets(case: Case, targets: Targets, grid: Grid, deltas: bool) -> None:
    """Labels, label weights, box targets and the normaliser, each level of each image."""
    found, sizes = gather_positives(targets), grid.level_sizes(targets.canvas)
    assert float(found.average) == float(case.arrays["avg_factor"])
    labels = torch.full(targets.assigned.shape, NUM_CLASSES)
    labels[found.image, found.anchor] = found.labels
    boxes = torch.zeros(*targets.assigned.shape, 4)
    if deltas:
        anchors = grid.anchors(targets.canvas, torch.float32)[found.anchor]
        boxes[found.image, found.anchor] = encode_deltas(anchors, found.boxes, (1.0, 1.0, 1.0, 1.0))
    else:
        boxes[found.image, found.anchor] = found.boxes
    ours = {"labels": labels, "label_weights": found.counted[..., 0], "bbox_targets": boxes}
    for name, whole in ours.items():
        for level, part in enumerate(whole.split(sizes, dim=1)):
            key = f"{name}_l{level}"
            if key in case.arrays or name != "bbox_targets":
                assert_near(part, case.arrays[key], key)


def check_gfl(case: Case) -> None:
    """QFL, GIoU and DFL of mmdet's GFLHead."""
    inputs = case.file("inputs_student")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    targets = make_targets(case, case.batch, canvas_of(inputs), ANCHOR_GRID, ATSS)
    check_targets(case, targets, ANCHOR_GRID, deltas=False)
    bins = box[0].shape[1] // 4
    losses = gfl_loss(flat(cls, (NUM_CLASSES,)), flat(box, (4, bins)), targets, ANCHOR_GRID)
    check_losses(case, losses, {"cls": cls, "bbox": box})


def check_atss(case: Case) -> None:
    """Focal, GIoU and centerness loss of mmdet's ATSSHead."""
    inputs = case.file("inputs_atss")
    cls = leaves(case.file("inputs_student"), "cls", case.cls_shift())
    box, centerness = leaves(inputs, "bbox"), leaves(inputs, "centerness")
    targets = make_targets(case, case.batch, canvas_of(inputs), ANCHOR_GRID, ATSS)
    check_targets(case, targets, ANCHOR_GRID, deltas=False)
    losses = atss_loss(flat(cls, (NUM_CLASSES,)), flat(box, (4,)), flat(centerness, (1,)), targets, ANCHOR_GRID)
    check_losses(case, losses, {"cls": cls, "bbox": box, "centerness": centerness})


def check_retina(case: Case) -> None:
    """Assignment, focal and L1 loss of mmdet's RetinaHead. Losses are of the file's own choice of tied anchors."""
    inputs = case.file("inputs_retina")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    canvas = canvas_of(inputs)
    ours = make_targets(case, case.batch, canvas, RETINA_GRID, MAX_IOU)
    assigned = []
    for i, boxes in enumerate(ours.boxes):
        golden = case.arrays[f"gt_inds_img{i}"]
        golden = torch.where(
            golden < 0, IGNORED, golden - 1
        )  # golden: -2 invalid, -1 ignored, 0 background, then boxes
        differs = golden != ours.assigned[i]
        assert not (differs & ~tied_anchors(canvas, boxes)).any(), f"image {i}: {int(differs.sum())} anchors differ"
        assigned.append(golden)
    targets = Targets(ours.boxes, ours.labels, ours.content, canvas, torch.stack(assigned), ours.valid)
    check_targets(case, targets, RETINA_GRID, deltas=True)
    losses = retinanet_loss(flat(cls, (NUM_CLASSES,)), flat(box, (4,)), targets, RETINA_GRID)
    check_losses(case, losses, {"cls": cls, "bbox": box})


def tied_anchors(canvas: Canvas, boxes: Tensor) -> Tensor:
    """Anchors [N] that share a box's highest IoU with another one, and overlap it less than a positive must."""
    iou = pairwise_iou(boxes.double(), RETINA_GRID.anchors(canvas))
    peak = iou.amax(dim=1, keepdim=True)
    tied = (iou >= peak - 1e-6) & (peak < MAX_IOU.pos_iou)
    return (tied & (tied.sum(dim=1, keepdim=True) > 1)).any(dim=0)


def check_atss_assign(case: Case) -> None:
    """ATSS positives, their IoU and the count of valid anchors of every image in the file."""
    canvas = canvas_of(case.file("inputs_student"))
    names = [key[: -len("_gt_inds")] for key in case.arrays if key.endswith("_gt_inds")]
    assert names
    for name in names:
        boxes, content = case.file("batches")[f"{name}_gt_bboxes"], content_of(case, name)
        ours = assign(ATSS, ANCHOR_GRID, canvas, boxes, content)
        golden = case.arrays[f"{name}_gt_inds"]
        assert torch.equal(ours, torch.where(golden == -2, IGNORED, golden - 1)), name
        positive = ours >= 0
        iou = pairwise_iou(boxes.double(), ANCHOR_GRID.anchors(canvas))
        best = iou[ours[positive].long(), torch.nonzero(positive)[:, 0]]
        assert_near(best, case.arrays[f"{name}_max_overlaps"][positive], f"{name} overlaps")
        labels = case.file("batches")[f"{name}_gt_labels"]
        assert torch.equal(case.arrays[f"{name}_labels"][positive], labels[ours[positive].long()])
        levels = ANCHOR_GRID.valid(canvas, content).split(ANCHOR_GRID.level_sizes(canvas))
        assert [int(v.sum()) for v in levels] == case.arrays[f"{name}_num_level_valid"].tolist()


def check_vlr(case: Case) -> None:
    """The valuable localization region, official and repaired, and the imitation masks (gi_* in check_general)."""
    canvas = canvas_of(case.file("inputs_student"))
    names = [key[: -len("_vlr")] for key in case.arrays if key.endswith("_vlr")]
    assert names
    for name in names:
        boxes, content = case.file("batches")[f"{name}_gt_bboxes"], content_of(case, name)
        valid = ANCHOR_GRID.valid(canvas, content)
        asis = pairwise_diou_official(boxes.double(), ANCHOR_GRID.anchors(canvas)).T
        assert_near(asis[valid], case.arrays[f"{name}_diou_asis"][valid], f"{name} official DIoU")
        assigned = assign(ATSS, ANCHOR_GRID, canvas, boxes, content)
        for metric, suffix in (("official", "vlr"), ("diou", "vlr_unionfixed")):
            spec = RegionSpec(vlr_metric=metric)  # type: ignore[arg-type]
            entries = compute_entries(frozenset({"main", "vlr"}), spec, ANCHOR_GRID, canvas, boxes, assigned, content)
            golden = case.arrays[f"{name}_{suffix}"].clamp(min=0)
            ours = torch.zeros_like(golden).index_copy(0, entries.index, entries.weight)
            flagged = entries.index[(entries.flag & VLR) != 0]
            assert torch.equal(flagged, torch.nonzero(golden)[:, 0]), f"{name} {suffix}"
            assert_near(ours, golden, f"{name} {suffix}")
    regions = {key.split("_im_")[0] for key in case.arrays if "_im_" in key}
    for name in regions:
        boxes, content = case.file("batches")[f"{name}_gt_bboxes"], content_of(case, name)
        inside = vlr_weights(RegionSpec(vlr_metric="inside"), ANCHOR_GRID, canvas, boxes, content) > 0
        fine = fine_grained_cells(ANCHOR_GRID, canvas, boxes, content)
        for kind, ours in (("finegrained", fine), ("fitnet", inside), ("gibox", inside), ("decouple", inside)):
            golden = case.arrays[f"{name}_im_{kind}"] == 1
            assert torch.equal(ours, golden), f"{name} {kind}: {int((ours != golden).sum())} cells differ"
    check_general_instances(case)


def check_gfl_predict(case: Case) -> None:
    """Integral, decoded boxes, and detections before and after NMS, for batch B unless the name says another."""
    inputs = case.file("inputs_student")
    canvas = canvas_of(inputs)
    maps = [inputs[f"bbox_l{k}"] for k in range(LEVELS)]
    distribution = flat(maps, (4, maps[0].shape[1] // 4))
    place = (canvas, torch.float32)
    boxes = decode_distribution(distribution, ANCHOR_GRID.centers(*place), ANCHOR_GRID.anchor_strides(*place))
    sizes = ANCHOR_GRID.level_sizes(canvas)
    for name, whole in (("integral", integral(distribution)), ("decoded", boxes)):
        for level, part in enumerate(whole.split(sizes, dim=1)):
            assert_near(part, case.arrays[f"{name}_l{level}"], f"{name}_l{level}")
    logits = flat([inputs[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,)) + case.cls_shift()
    content = torch.tensor([content_of(case, name) for name in images(case, case.batch or "B")])
    thresholds = {m[1] for key in case.arrays if (m := re.match(r"thr(\d+)_", key))}
    assert thresholds
    for tag in thresholds:
        threshold, scores = int(tag) / 100, logits.sigmoid()
        after = decode(boxes, scores, sizes, content, score_thr=threshold, nms_pre=1000, nms_iou=0.6, max_per_image=100)
        for i in range(len(content)):
            before = candidates(boxes[i], scores[i], sizes, content[i], score_thr=threshold, nms_pre=1000)
            for stage, ours in (("prenms", before), ("nms", after[i])):
                key = f"thr{tag}_{stage}_img{i}"
                assert torch.equal(ours.labels, case.arrays[f"{key}_labels"].long()), key
                assert_near(ours.scores, case.arrays[f"{key}_scores"], key)
                assert_near(ours.boxes, case.arrays[f"{key}_bboxes"], key)


CHECKS: dict[str, Callable[[Case], None]] = {
    "anchors": check_anchors,
    "atss": check_atss,
    "atss_assign": check_atss_assign,
    "bckd_cls": check_bckd_cls,
    "bckd_head": check_bckd_head,
    "bckd_loc": check_bckd_loc,
    "defeat_cls": check_defeat_cls,
    "defeat_neck": check_defeat_neck,
    "defeat_neck_inputs": check_defeat_inputs,
    "fcos": check_fcos,
    "fcosplus": check_fcosplus,
    "gfl": check_gfl,
    "gfl_predict": check_gfl_predict,
    "kl": check_kl,
    "ld_mmdet3": check_ld_mmdet3,
    "ld_repo": check_ld_repo,
    "retina": check_retina,
    "vlr_im_region": check_vlr,
}
