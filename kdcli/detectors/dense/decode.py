"""From dense boxes and scores to detections: mmdet's rule of the dense heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from kdcli.structures import Detections


def candidates(
    boxes: Tensor,
    scores: Tensor,
    level_sizes: list[int],
    content: Tensor,
    *,
    score_thr: float,
    nms_pre: int,
    centerness: Tensor | None = None,
) -> Detections:
    """One image before NMS: on each level the ``nms_pre`` best (anchor, class) pairs above ``score_thr``.

    ``boxes`` [N, 4], ``scores`` [N, K], ``content`` [2] (height, width) in pixels, which boxes are clipped to;
    those that lie outside it are dropped. Levels follow each other, each best first, the lower (anchor, class) first in
    a tie. ``centerness`` [N] in 0..1 multiplies the scores of what was chosen without it, so that they may end up below
    the threshold: mmdet 3.3.0's rule (2.x chose by the product).
    """
    picked, start = [], 0
    for size in level_sizes:
        level = scores[start : start + size].reshape(-1)
        pairs = torch.nonzero(level > score_thr).squeeze(1)
        order = level[pairs].sort(descending=True, stable=True).indices[:nms_pre]
        picked.append(pairs[order] + start * scores.shape[1])
        start += size
    pair = torch.cat(picked)
    limit = content.flip(0).repeat(2).to(boxes)  # width, height, width, height
    clipped = boxes[pair // scores.shape[1]].clamp(min=0).minimum(limit)
    inside = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
    pair = pair[inside]
    chosen = scores.reshape(-1)[pair]
    if centerness is not None:
        chosen = chosen * centerness[pair // scores.shape[1]]
    return Detections(clipped[inside], chosen, pair % scores.shape[1])


@torch.no_grad()
def decode(
    boxes: Tensor,
    scores: Tensor,
    level_sizes: list[int],
    content: Tensor,
    *,
    centerness: Tensor | None = None,
    score_thr: float = 0.05,
    nms_pre: int = 1000,
    nms_iou: float = 0.6,
    max_per_image: int = 100,
) -> list[Detections]:
    """Detections of a batch, best first, clipped to the content; class-aware NMS.

    ``boxes`` [B, N, 4] canvas pixels, ``scores`` [B, N, K] and ``centerness`` [B, N] in 0..1, ``level_sizes`` anchors a
    level (sum N), ``content`` [B, 2] (height, width) in pixels. Anchors outside the valid area take part, as in mmdet.
    """
    results = []
    # float32: torchvision's NMS refuses bf16 on a CPU
    for image in range(len(content)):
        found = candidates(
            boxes[image].float(),
            scores[image].float(),
            level_sizes,
            content[image],
            score_thr=score_thr,
            nms_pre=nms_pre,
            centerness=None if centerness is None else centerness[image].float(),
        )
        keep = batched_nms(found.boxes, found.scores, found.labels, nms_iou)[:max_per_image]
        results.append(Detections(found.boxes[keep], found.scores[keep], found.labels[keep]))
    return results
