"""One check for each kind of reference file; a new kind is one more function in ``CHECKS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kdcli.detectors.dense.decode import candidates, decode
from kdcli.detectors.dense.losses import atss_loss, centerness_target, gather_positives, retinanet_loss
from kdcli.geometry.assign import assign
from kdcli.geometry.boxes import encode_deltas, pairwise_iou
from kdcli.geometry.derive import decode_distribution, integral
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec, compute_entries, fine_grained_cells, vlr_metric, vlr_weights
from kdcli.methods.divergence import kl_rows
from kdcli.structures import IGNORED, VLR, Canvas, Targets
from tests.support.golden.bckd import check_bckd_cls, check_bckd_loc
from tests.support.golden.bckd_head import check_bckd_head
from tests.support.golden.case import (
    ANCHOR_GRID,
    ATSS,
    LEVELS,
    MAX_IOU,
    RETINA_GRID,
    Case,
    assert_near,
    by_level,
    canvas_of,
    check_losses,
    content_of,
    flat,
    images,
    leaves,
    make_targets,
)
from tests.support.golden.defeat import check_defeat_cls, check_defeat_inputs, check_defeat_neck
from tests.support.golden.fcos import check_fcos, check_fcosplus
from tests.support.golden.ld import check_general_instances, check_ld_mmdet3, check_ld_repo, gfl_of

NUM_CLASSES = 20
KL_INPUTS = ("pred", "soft_label", "weight", "T", "loss_weight", "avg_factor")


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
    for key, found in case.arrays.matching(r"(\w+)_valid").items():
        assert torch.equal(ANCHOR_GRID.valid(canvas, content_of(case, found[1])), case.arrays[key].bool()), key
    for key, found in case.arrays.matching(rf"({'|'.join(ours)})_l(\d)").items():
        assert_near(ours[found[1]][int(found[2])], case.arrays[key], key)


def check_kl(case: Case) -> None:
    """KL with temperature: rows, mean, weighted mean and with the loss weight."""
    tags = [found[1] for found in case.arrays.matching(r"(\w+)_pred").values()]
    assert tags
    for tag in tags:
        g = {key: case.arrays[f"{tag}_{key}"] for key in KL_INPUTS}
        pred = g["pred"].clone().requires_grad_()
        rows = kl_rows(pred, g["soft_label"], float(g["T"]))
        assert_near(rows, case.arrays[f"{tag}_loss_none"], f"{tag} rows")
        weighted = (rows * g["weight"]).sum() / g["avg_factor"]
        for form, loss in (
            ("mean", rows.mean()),
            ("weighted", weighted),
            ("module", weighted * g["loss_weight"]),
        ):
            assert_near(loss.reshape(1), case.arrays[f"{tag}_loss_{form}"], f"{tag} {form}")
            (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
            assert_near(gradient, case.arrays[f"{tag}_grad_{form}"], f"{tag} gradient of {form}")


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
    losses, levels = gfl_of(cls, box, targets, eps=None)
    check_losses(case, losses, {"cls": cls, "bbox": box}, levels)


def check_atss(case: Case) -> None:
    """Focal, GIoU and centerness loss of mmdet's ATSSHead."""
    inputs = case.file("inputs_atss")
    cls = leaves(case.file("inputs_student"), "cls", case.cls_shift())
    box, centerness = leaves(inputs, "bbox"), leaves(inputs, "centerness")
    targets = make_targets(case, case.batch, canvas_of(inputs), ANCHOR_GRID, ATSS)
    check_targets(case, targets, ANCHOR_GRID, deltas=False)
    outputs = flat(cls, (NUM_CLASSES,)), flat(box, (4,)), flat(centerness, (1,))

    def loss(part: Targets) -> dict[str, Tensor]:
        return atss_loss(*outputs, part, ANCHOR_GRID)

    def norms(part: Targets) -> dict[str, float]:
        found = gather_positives(part)
        centers = ANCHOR_GRID.centers(part.canvas, torch.float32)[found.anchor]
        total = max(float(centerness_target(centers, found.boxes).sum()), 1.0)
        average = float(found.average)
        return {"loss_cls": average, "loss_bbox": total, "loss_centerness": average}

    levels = by_level(loss, norms, targets, ANCHOR_GRID.level_sizes(targets.canvas))
    check_losses(case, loss(targets), {"cls": cls, "bbox": box, "centerness": centerness}, levels)


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
    targets = replace(ours, canvas=canvas, assigned=torch.stack(assigned))
    check_targets(case, targets, RETINA_GRID, deltas=True)
    outputs = flat(cls, (NUM_CLASSES,)), flat(box, (4,))

    def loss(part: Targets) -> dict[str, Tensor]:
        return retinanet_loss(*outputs, part, RETINA_GRID)

    def norms(part: Targets) -> dict[str, float]:
        return dict.fromkeys(("loss_cls", "loss_bbox"), float(gather_positives(part).average))

    levels = by_level(loss, norms, targets, RETINA_GRID.level_sizes(canvas))
    check_losses(case, loss(targets), {"cls": cls, "bbox": box}, levels)


def tied_anchors(canvas: Canvas, boxes: Tensor) -> Tensor:
    """Anchors [N] that share a box's highest IoU with another one, and overlap it less than a positive must."""
    iou = pairwise_iou(boxes.double(), RETINA_GRID.anchors(canvas))
    peak = iou.amax(dim=1, keepdim=True)
    tied = (iou >= peak - 1e-6) & (peak < MAX_IOU.pos_iou)
    return (tied & (tied.sum(dim=1, keepdim=True) > 1)).any(dim=0)


def check_atss_assign(case: Case) -> None:
    """ATSS positives, their IoU and the count of valid anchors of every image in the file."""
    canvas = canvas_of(case.file("inputs_student"))
    names = [found[1] for found in case.arrays.matching(r"(\w+)_gt_inds").values()]
    assert names
    for name in names:
        boxes, content = case.file("batches")[f"{name}_gt_bboxes"], content_of(case, name)
        ours = assign(ATSS, ANCHOR_GRID, canvas, boxes, content)
        golden = case.arrays[f"{name}_gt_inds"]
        assert torch.equal(ours, torch.where(golden == -2, IGNORED, golden - 1)), name
        positive = ours >= 0
        iou = pairwise_iou(boxes.double(), ANCHOR_GRID.anchors(canvas))
        # an image without boxes has overlap 0 everywhere, another -1 where no box was assigned
        overlaps = torch.where(ours == IGNORED, -2.0, -1.0 if len(boxes) else 0.0)
        overlaps[positive] = iou[ours[positive].long(), torch.nonzero(positive)[:, 0]].float()
        assert_near(overlaps, case.arrays[f"{name}_max_overlaps"], f"{name} overlaps")
        labels = torch.where(ours == IGNORED, -2, -1)
        labels[positive] = case.file("batches")[f"{name}_gt_labels"][ours[positive].long()].long()
        assert torch.equal(labels, case.arrays[f"{name}_labels"].long()), f"{name} labels"
        levels = ANCHOR_GRID.valid(canvas, content).split(ANCHOR_GRID.level_sizes(canvas))
        assert [int(v.sum()) for v in levels] == case.arrays[f"{name}_num_level_valid"].tolist()


def check_vlr(case: Case) -> None:
    """The valuable localization region, official and repaired, the imitation masks, and the general instances."""
    names = [found[1] for found in case.arrays.matching(r"(\w+)_vlr").values()]
    regions = {found[1]: None for found in case.arrays.matching(r"(\w+_img\d+)_im_\w+").values()}
    assert names
    for name in names:
        check_vlr_of(case, name)
    canvas = canvas_of(case.file("inputs_student"))
    for name in regions:
        boxes, content = case.file("batches")[f"{name}_gt_bboxes"], content_of(case, name)
        valid = ANCHOR_GRID.valid(canvas, content)
        inside = vlr_weights(RegionSpec(vlr_metric="inside"), ANCHOR_GRID, canvas, boxes, content) > 0
        fine = fine_grained_cells(ANCHOR_GRID, canvas, boxes, content)
        for kind, ours in (("finegrained", fine), ("fitnet", inside), ("gibox", inside), ("decouple", inside)):
            if f"{name}_im_{kind}" in case.arrays:
                golden, marked = case.arrays[f"{name}_im_{kind}"], torch.where(valid, ours.int(), -1)
                assert torch.equal(marked, golden.int()), f"{name} {kind}: {int((marked != golden).sum())} cells differ"
    check_general_instances(case, case.batch or names[0].split("_img")[0])


def check_vlr_of(case: Case, name: str) -> None:
    """The region of one image in both forms; anchors outside the valid area are -1 there."""
    canvas = canvas_of(case.file("inputs_student"))
    boxes, content = case.file("batches")[f"{name}_gt_bboxes"], content_of(case, name)
    valid = ANCHOR_GRID.valid(canvas, content)
    anchors = ANCHOR_GRID.anchor_columns(canvas).numpy()[:, None]
    asis = torch.from_numpy(vlr_metric("official", boxes.double().numpy().T[..., None], anchors)[0].T)
    assert_near(asis[valid], case.arrays[f"{name}_diou_asis"][valid], f"{name} official DIoU")
    assigned = assign(ATSS, ANCHOR_GRID, canvas, boxes, content)
    for metric, suffix in (("official", "vlr"), ("diou", "vlr_unionfixed")):
        spec = RegionSpec(vlr_metric=metric)  # type: ignore[arg-type]
        entries = compute_entries(frozenset({"main", "vlr"}), spec, ANCHOR_GRID, canvas, boxes, assigned, content)
        golden = case.arrays[f"{name}_{suffix}"]
        ours = torch.where(valid, torch.zeros_like(golden), -1.0).index_copy(0, entries.index, entries.weight)
        flagged = entries.index[(entries.flag & VLR) != 0]
        assert torch.equal(flagged, torch.nonzero(golden > 0)[:, 0]), f"{name} {suffix}"
        assert_near(ours, golden, f"{name} {suffix}")


def check_gfl_predict(case: Case) -> None:
    """Integral, decoded boxes, and detections before and after NMS, for batch B unless the name says another."""
    inputs = case.file("inputs_student")
    canvas = canvas_of(inputs)
    maps = [inputs[f"bbox_l{k}"] for k in range(LEVELS)]
    distribution = flat(maps, (4, maps[0].shape[1] // 4))
    storage = (canvas, torch.float32)
    boxes = decode_distribution(distribution, ANCHOR_GRID.centers(*storage), ANCHOR_GRID.anchor_strides(*storage))
    sizes = ANCHOR_GRID.level_sizes(canvas)
    for name, whole in (("integral", integral(distribution)), ("decoded", boxes)):
        for level, part in enumerate(whole.split(sizes, dim=1)):
            assert_near(part, case.arrays[f"{name}_l{level}"], f"{name}_l{level}")
    logits = flat([inputs[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,)) + case.cls_shift()
    content = torch.tensor([content_of(case, name) for name in images(case, case.batch or "B")])
    thresholds = {found[1] for found in case.arrays.matching(r"thr(\d+)_\w+").values()}
    assert thresholds
    nms_pre, most = int(case.setting(1000, "nms_pre")), int(case.setting(100, "max_per_img"))
    iou = case.setting(0.6, "nms_iou")
    for tag in thresholds:
        threshold, scores = int(tag) / 100, logits.sigmoid()
        after = decode(
            boxes, scores, sizes, content, score_thr=threshold, nms_pre=nms_pre, nms_iou=iou, max_per_image=most
        )
        for i in range(len(content)):
            before = candidates(boxes[i], scores[i], sizes, content[i], score_thr=threshold, nms_pre=nms_pre)
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
