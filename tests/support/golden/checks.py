"""One check for each kind of reference file; a new kind is one more function in ``CHECKS``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kdcli.detectors.dense.decode import candidates, decode
from kdcli.detectors.dense.losses import atss_loss, centerness_target, gather_positives, retinanet_loss
from kdcli.geometry.assign import assign
from kdcli.geometry.boxes import aligned_iou, encode_deltas, pairwise_iou
from kdcli.geometry.derive import decode_distribution, integral
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec, compute_entries, fine_grained_cells, inside_cells, vlr_metric
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
    at_valid,
    by_level,
    canvas_of,
    check_losses,
    compare,
    content_of,
    flat,
    images,
    leaves,
    make_targets,
    number,
)
from tests.support.golden.defeat import check_defeat_cls, check_defeat_inputs, check_defeat_neck
from tests.support.golden.fcos import check_fcos, check_fcosplus
from tests.support.golden.ld import check_general_instances, check_ld_mmdet3, check_ld_repo, gfl_of

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
    for key, found in case.arrays.matching(r"(\w+)_valid").items():
        assert torch.equal(ANCHOR_GRID.valid(canvas, content_of(case, found[1])), case.arrays.golden(key).bool()), key
    for key, found in case.arrays.matching(rf"({'|'.join(ours)})_l(\d)").items():
        compare(case, key, ours[found[1]][int(found[2])])


def check_kl(case: Case) -> None:
    """KL with temperature: rows, mean, weighted mean and with the loss weight, and the gradient of each."""
    for tag in sorted({found[1] for found in case.arrays.matching(r"(\w+?)_(?:loss|grad)_(?!weight$)\w+").values()}):
        pred = case.need(f"{tag}_pred", tag).clone().requires_grad_()
        degrees = re.search(r"_T(\d+(?:p\d+)?)$", tag)
        said = number(degrees[1]) if degrees else float("nan")
        temperature = case.setting(said, f"{tag}_T")
        assert temperature == temperature, f"{case.name}.npz: {tag}_T is missing, the temperature of {tag}"
        rows = kl_rows(pred, case.need(f"{tag}_soft_label", tag), temperature)
        compare(case, f"{tag}_loss_none", rows)
        check_form(case, tag, "mean", rows.mean(), pred)
        for form in ("weighted", "module"):
            if not {f"{tag}_loss_{form}", f"{tag}_grad_{form}"} & case.arrays.keys():
                continue
            factors = [case.need(f"{tag}_{name}", f"{tag} {form}") for name in ("weight", "avg_factor")]
            scale = case.need(f"{tag}_loss_weight", f"{tag} module") if form == "module" else 1.0
            check_form(case, tag, form, (rows * factors[0]).sum() / factors[1] * scale, pred)
    # inputs, of which a file may use some
    case.arrays.leave_out(r"\w+_(pred|soft_label|weight|avg_factor|loss_weight|T)")


def check_form(case: Case, tag: str, form: str, loss: Tensor, pred: Tensor) -> None:
    """``<tag>_loss_<form>`` and ``<tag>_grad_<form>``, each where the file has it."""
    compare(case, f"{tag}_loss_{form}", loss.reshape(1))
    if f"{tag}_grad_{form}" in case.arrays:
        (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
        compare(case, f"{tag}_grad_{form}", gradient)


def check_targets(case: Case, targets: Targets, grid: Grid, deltas: bool) -> None:
    """What the file has of labels, label weights, box targets and the normaliser, each level of each image."""
    found, sizes = gather_positives(targets), grid.level_sizes(targets.canvas)
    for name in ("avg_factor", "num_total_samples"):
        compare(case, name, found.average.reshape(case.arrays[name].shape) if name in case.arrays else found.average)
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
            compare(case, f"{name}_l{level}", part)


def check_scores(case: Case, cls: list[Tensor], box: list[Tensor], targets: Targets) -> None:
    """Scores of a GFL head by level, where the file has them: of each positive the IoU that its class learns (``score``), and
    the student's best class, which weighs its box (``weight_targets``), [B, N]; 0 elsewhere, invalid anchors too."""
    logits, edges = flat(cls, (NUM_CLASSES,)).detach(), flat(box, (4, box[0].shape[1] // 4)).detach()
    found, storage = gather_positives(targets), (targets.canvas, torch.float32)
    place = (found.image, found.anchor)
    decoded = decode_distribution(
        edges[place],
        ANCHOR_GRID.centers(*storage)[found.anchor],
        ANCHOR_GRID.anchor_strides(*storage)[found.anchor],
    )
    stride = ANCHOR_GRID.anchor_strides(*storage)[found.anchor, None]  # the unit of the eps
    quality, best = (torch.zeros(logits.shape[:2]) for _ in range(2))
    quality[place] = aligned_iou(decoded / stride, found.boxes / stride)
    best[place] = logits[place].sigmoid().amax(dim=-1)
    for name, whole in (("score", quality), ("scores", quality), ("weight_targets", best)):
        for level, part in enumerate(whole.split(ANCHOR_GRID.level_sizes(targets.canvas), dim=1)):
            key = f"{name}_l{level}"
            if key in case.arrays:
                compare(case, key, part.reshape(case.arrays[key].shape))


def check_gfl(case: Case) -> None:
    """QFL, GIoU and DFL of mmdet's GFLHead."""
    inputs = case.file("inputs_student")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    targets = make_targets(case, case.batch, canvas_of(inputs), ANCHOR_GRID, ATSS)
    check_targets(case, targets, ANCHOR_GRID, deltas=False)
    check_scores(case, cls, box, targets)
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
        if f"gt_inds_img{i}" not in case.arrays:
            assert not tied_anchors(canvas, boxes).any(), (
                f"{case.name}.npz: gt_inds_img{i} is missing, which of tied anchors the losses are of"
            )
            assigned.append(ours.assigned[i])
            continue
        golden = case.arrays.golden(f"gt_inds_img{i}")
        golden = torch.where(
            golden < 0, IGNORED, golden - 1
        )  # golden: -2 invalid, -1 ignored, 0 background, then boxes
        differs = golden != ours.assigned[i]
        assert not (differs & ~tied_anchors(canvas, boxes)).any(), f"image {i}: {int(differs.sum())} anchors differ"
        assigned.append(golden.to(ours.assigned.dtype))
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
    """What the file has of each image: ATSS positives, their IoU and label, and the count of valid anchors."""
    canvas = canvas_of(case.file("inputs_student"))
    kinds = r"(\w+_img\d+)_(gt_inds|max_overlaps|labels|num_level_valid)"
    for name in sorted({found[1] for found in case.arrays.matching(kinds).values()}):
        check_assigned(case, name, canvas)


def check_assigned(case: Case, name: str, canvas: Canvas) -> None:
    """One image. Invalid anchors have -2, or 0."""
    boxes, content = boxes_of(case, name), content_of(case, name)
    ours = assign(ATSS, ANCHOR_GRID, canvas, boxes, content)
    valid, positive = ANCHOR_GRID.valid(canvas, content), ours >= 0
    iou = pairwise_iou(boxes.double(), ANCHOR_GRID.anchors(canvas))
    # an image without boxes has overlap 0 everywhere, another -1 where no box was assigned
    overlaps = torch.full(ours.shape, -1.0 if len(boxes) else 0.0)
    overlaps[positive] = iou[ours[positive].long(), torch.nonzero(positive)[:, 0]].float()
    labels = torch.full(ours.shape, -1)
    labels[positive] = case.file("batches")[f"{name}_gt_labels"][ours[positive].long()].long()
    for kind, values in (("gt_inds", ours + 1), ("max_overlaps", overlaps), ("labels", labels)):
        key = f"{name}_{kind}"
        if key in case.arrays:
            compare(case, key, at_valid(values, case.arrays[key], valid, -2))
    levels = valid.split(ANCHOR_GRID.level_sizes(canvas))
    compare(case, f"{name}_num_level_valid", torch.tensor([int(v.sum()) for v in levels]))


def boxes_of(case: Case, name: str) -> Tensor:
    """The boxes of an image such as ``A_img0``."""
    batches = case.file("batches")
    assert f"{name}_gt_bboxes" in batches, f"{case.name}.npz: {name} is no image of batches.npz"
    return batches[f"{name}_gt_bboxes"]


def check_vlr(case: Case) -> None:
    """The valuable localization region, official and repaired, the imitation masks, and the general instances."""
    kinds = r"(\w+_img\d+)_(?:vlr|vlr_unionfixed|diou_asis|im_(?:finegrained|fitnet|gibox|decouple))"
    canvas = canvas_of(case.file("inputs_student"))
    for name in sorted({found[1] for found in case.arrays.matching(kinds).values()}):
        check_vlr_of(case, name, canvas)
    check_general_instances(case)


def check_vlr_of(case: Case, name: str, canvas: Canvas) -> None:
    """What the file has of one image; anchors outside the valid area are -1 there, or 0."""
    boxes, content = boxes_of(case, name), content_of(case, name)
    valid = ANCHOR_GRID.valid(canvas, content)
    inside, fine = (
        inside_cells(ANCHOR_GRID, canvas, boxes.double()),
        fine_grained_cells(ANCHOR_GRID, canvas, boxes, content),
    )
    for kind, cells in (("finegrained", fine), ("fitnet", inside), ("gibox", inside), ("decouple", inside)):
        key = f"{name}_im_{kind}"
        if key in case.arrays:
            compare(case, key, at_valid(cells.int(), case.arrays[key], valid, -1))
    if f"{name}_diou_asis" in case.arrays:
        anchors = ANCHOR_GRID.anchor_columns(canvas).numpy()[:, None]
        asis = torch.from_numpy(vlr_metric("official", boxes.double().numpy().T[..., None], anchors)[0].T)
        golden = case.arrays.golden(f"{name}_diou_asis")
        assert golden.shape == asis.shape, f"{name}_diou_asis: {tuple(golden.shape)} against {tuple(asis.shape)}"
        assert_near(asis[valid], golden[valid], f"{name} official DIoU")
    assigned = assign(ATSS, ANCHOR_GRID, canvas, boxes, content)
    for metric, suffix in (("official", "vlr"), ("diou", "vlr_unionfixed")):
        if f"{name}_{suffix}" not in case.arrays:
            continue
        spec = RegionSpec(vlr_metric=metric)  # type: ignore[arg-type]
        entries = compute_entries(frozenset({"main", "vlr"}), spec, ANCHOR_GRID, canvas, boxes, assigned, content)
        golden = case.arrays[f"{name}_{suffix}"]
        flagged = entries.index[(entries.flag & VLR) != 0]
        assert torch.equal(flagged, torch.nonzero(golden > 0)[:, 0]), f"{name} {suffix}"
        ours = torch.zeros(len(valid)).index_copy(0, entries.index, entries.weight)
        compare(case, f"{name}_{suffix}", at_valid(ours, golden, valid, -1))


def check_gfl_predict(case: Case) -> None:
    """What the file has of scores, integral, decoded boxes, and detections before and after NMS."""
    inputs = case.file("inputs_student")
    canvas = canvas_of(inputs)
    maps = [inputs[f"bbox_l{k}"] for k in range(LEVELS)]
    distribution = flat(maps, (4, maps[0].shape[1] // 4))
    storage = (canvas, torch.float32)
    boxes = decode_distribution(distribution, ANCHOR_GRID.centers(*storage), ANCHOR_GRID.anchor_strides(*storage))
    sizes = ANCHOR_GRID.level_sizes(canvas)
    logits = flat([inputs[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,)) + case.cls_shift()
    scores = logits.sigmoid()
    for name, whole in (("integral", integral(distribution)), ("decoded", boxes), ("scores", scores)):
        for level, part in enumerate(whole.split(sizes, dim=1)):
            compare(case, f"{name}_l{level}", part)
    thresholds = sorted({found[1] for found in case.arrays.matching(r"thr(\d+)_(?:prenms|nms)_img\d+_\w+").values()})
    if not thresholds:
        return
    content = torch.tensor([content_of(case, name) for name in images(case, case.batch)])
    nms_pre, most = int(case.setting(1000, "nms_pre")), int(case.setting(100, "max_per_img"))
    iou = case.setting(0.6, "nms_iou")
    for tag in thresholds:
        threshold = int(tag) / 100
        after = decode(
            boxes, scores, sizes, content, score_thr=threshold, nms_pre=nms_pre, nms_iou=iou, max_per_image=most
        )
        for i in range(len(content)):
            before = candidates(boxes[i], scores[i], sizes, content[i], score_thr=threshold, nms_pre=nms_pre)
            for stage, ours in (("prenms", before), ("nms", after[i])):
                key = f"thr{tag}_{stage}_img{i}"
                compare(case, f"{key}_labels", ours.labels)
                compare(case, f"{key}_scores", ours.scores)
                compare(case, f"{key}_bboxes", ours.boxes)


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
