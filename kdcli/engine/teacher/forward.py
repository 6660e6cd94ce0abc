"""The teacher at work: its forward pass for a store that is written, and for a run beside which it stays in memory.

For the loop a teacher is a callable from a batch to tensors. A stored one is ``StoreSchema.decode_batch``; the loop cannot
tell them apart.

There is one forward function for the live teacher and for the writer of stores. It takes clean uint8 canvases in
micro-batches of one recorded size (the last one filled up by repetition), because a convolution's rounding depends on
the batch size (1e-6 between 1 and 8), not on the neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.classes import ClassList, look_alike
from kdcli.detectors.base import Detector
from kdcli.detectors.read import read
from kdcli.engine.loading.samples import Sample, collate
from kdcli.errors import DataError, OptionError
from kdcli.store.schema import MAX_PROPOSALS, StoreSchema, row_tensor
from kdcli.structures import Batch, Canvas, Entries, Targets
from kdcli.tensors import CLS_LOGITS, PROPOSAL_BOXES, PROPOSAL_COUNT, PROPOSAL_LOGITS, Need, Region, Tensors

Teacher = Callable[[Batch], Tensors]


@dataclass(frozen=True)
class TeacherForward:
    """A frozen detector with everything that its output numbers depend on."""

    detector: Detector  # eval mode, on its device
    class_order: tuple[int, ...]  # teacher class of each data set class
    micro_batch: int = 8
    precision: str = "fp32"
    network: Callable[[Tensor], Tensors] | None = None  # the compiled forward of ``detector``; None: its own

    @torch.no_grad()
    def rows(
        self, images: Tensor, targets: Targets, entries: Entries | None, needs: Iterable[Need],
        proposals: Sequence[Tensor] | None = None,
    ) -> list[Tensors]:  # fmt: skip
        """Teacher tensors by ``Need.key`` for each image of ``images`` [B, 3, H, W] uint8, all of one orientation.

        ``proposals``: boxes [R, 4] of each image to read the RoI head at instead of the teacher's own, when two runs are
        compared: a last digit decides what NMS keeps.
        """
        wanted = tuple(needs)
        rows = []
        for start in range(0, len(images), self.micro_batch):
            chunk = images[start : start + self.micro_batch]
            outputs = self.outputs(chunk)
            for offset in range(len(chunk)):
                # image by image: a vectorised sigmoid may round the last elements of a longer array differently
                one = {name: value[offset : offset + 1] for name, value in outputs.items()}
                part = None if entries is None else single(entries, start + offset)
                target = _single_target(targets, start + offset)
                at = None
                if any(n.region == Region.PROPOSALS for n in wanted):
                    at = self._proposals(one, target) if proposals is None else [proposals[start + offset]]
                rows.append(self._reorder(read(self.detector, one, wanted, part, target, at)))
        return rows

    def _proposals(self, outputs: Tensors, target: Targets) -> list[Tensor]:
        """The proposals of one image with its ground-truth boxes behind them: what a student samples from."""
        found = self.detector.proposals(outputs, target.content, target.canvas)[0][:MAX_PROPOSALS]
        return [torch.cat([found, target.boxes[0].to(found)])]

    def _reorder(self, row: Tensors) -> Tensors:
        """RoI logits with the classes in the data set's order, background last.

        A softmax gives what is surely a class that the data set lacks to the background: its probability moves there.
        """
        key = Need(PROPOSAL_LOGITS, Region.PROPOSALS).key
        if key in row:
            logits = row[key]
            rest = [k for k in range(logits.shape[-1]) if k not in self.class_order]
            background = logits[:, rest].logsumexp(dim=-1, keepdim=True) if len(rest) > 1 else logits[:, rest]
            row[key] = torch.cat([logits[:, list(self.class_order)], background], dim=-1)
        return row

    @property
    def relabel(self) -> np.ndarray | None:
        """For detections in the teacher's own labels: the data set's label of each, -1 for none. None when ``outputs``
        has them in the data set's order already, as those of a dense head."""
        specs = self.detector.specs()
        if PROPOSAL_LOGITS not in specs:
            return None
        labels = np.full(specs[PROPOSAL_LOGITS].dims[0] - 1, -1)
        labels[list(self.class_order)] = np.arange(len(self.class_order))
        return labels

    @torch.no_grad()
    def outputs(self, chunk: Tensor) -> Tensors:
        """Float32 outputs of one micro-batch [b <= micro_batch, 3, H, W] uint8, classes in the data set's order."""
        real = len(chunk)
        if real < self.micro_batch:
            chunk = torch.cat([chunk, chunk[-1:].expand(self.micro_batch - real, -1, -1, -1)])
        pixels = chunk.float().div_(255)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs = self.detector(pixels) if self.network is None else self.network(pixels)
        outputs = {name: value[:real].float() for name, value in outputs.items()}
        if CLS_LOGITS in outputs and self.class_order != tuple(range(outputs[CLS_LOGITS].shape[-1])):
            outputs[CLS_LOGITS] = outputs[CLS_LOGITS][..., list(self.class_order)].contiguous()
        return outputs


@dataclass(frozen=True)
class TeacherRunner:
    """A frozen teacher on its device, and the data workers in front of it."""

    forward: TeacherForward
    device: torch.device
    workers: int  # data workers; 0: images are loaded in this process

    @property
    def interleaved(self) -> bool:
        """Whether loading and encoding go between the passes of the teacher, not beside them."""
        return self.device.type == "cpu" and self.workers == 0

    @property
    def exact(self) -> TeacherRunner:
        """The same teacher in float32."""
        return replace(self, forward=replace(self.forward, precision="fp32"))

    def rows(
        self, samples: Sequence[Sample], needs: Sequence[Need], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, NDArray[np.float32]]]:
        """Teacher tensors (float32, by ``Need.key``) of samples of one orientation. ``proposals``: see TeacherForward.rows."""
        if not needs:  # cached images alone are added to a store
            return [{} for _ in samples]
        batch = collate(samples, None).to(self.device)
        return [
            {need.key: row_tensor(row[need.key][0] if need.dense else row[need.key]) for need in needs}
            for row in self.forward.rows(batch.images, batch.targets, batch.entries, needs, proposals)
        ]


def compiled(forward: TeacherForward, canvas: Canvas) -> TeacherForward:
    """``forward`` with its network compiled by PyTorch, whole and for fixed shapes; compiles for ``canvas`` at once, and
    for its transpose when a batch has it.

    Raises OptionError where PyTorch cannot compile it: without a C++ compiler (on a CPU), or for code of a model of yours.
    """
    from torch._dynamo.exc import TorchDynamoException  # starting the compiler takes seconds

    made = replace(forward, network=torch.compile(forward.detector, fullgraph=True, dynamic=False))
    device = next(forward.detector.parameters()).device
    try:
        made.outputs(torch.zeros((1, 3, *canvas.size), dtype=torch.uint8, device=device))
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)  # what the compiler behind the tracer said
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise OptionError(
            f"--compile: PyTorch cannot compile the teacher here ({reason[:200]}); install a C++ compiler such as g++, or "
            "leave out --compile"
        ) from error
    return made


def live(forward: TeacherForward, needs: tuple[Need, ...], schema: StoreSchema) -> Teacher:
    """The teacher in memory. ``schema`` says which needs are dense, per cell or per anchor."""

    def teacher(batch: Batch) -> Tensors:
        rows = forward.rows(batch.images, batch.targets, batch.entries, needs)
        tensors = {}
        for stored in schema.restrict(needs):
            key = stored.need.key
            if not stored.need.dense:
                tensors[key] = torch.cat([r[key] for r in rows])
                continue
            value = torch.cat([r[key] for r in rows])
            valid = schema.valid_rows(stored, batch.targets.valid)
            # a store holds 0 in invalid cells
            tensors[key] = value.masked_fill(~valid.reshape(*valid.shape, *[1] * (value.ndim - 2)), 0)
        if any(n.region == Region.PROPOSALS for n in needs):
            counts = [len(r[Need(PROPOSAL_BOXES, Region.PROPOSALS).key]) for r in rows]
            tensors[PROPOSAL_COUNT] = torch.tensor(counts, device=batch.images.device)
        return tensors

    return teacher


def class_order(teacher: ClassList, dataset: ClassList) -> tuple[int, ...]:
    """For each data set class the teacher's class of the same name. Raises DataError when one is missing."""
    known = teacher.names
    missing = [name for name in dataset.names if name not in known]
    if missing:
        alike = {name: look_alike(name, known) for name in missing}
        near = [f"{other!r} is not {name!r}" for name, other in alike.items() if other is not None]
        raise DataError(
            f"the teacher does not know {', '.join(repr(m) for m in missing)}; it knows "
            f"{', '.join(repr(c) for c in known[:10])}; classes are matched by name"
            + (f", letter by letter: {', '.join(near)}" if near else "")
        )
    return tuple(known.index(name) for name in dataset.names)


def single(entries: Entries, image: int) -> Entries:
    """The entries of one image of a batch, as those of a batch of one."""
    mine = entries.image == image
    return Entries(
        entries.index[mine],
        entries.flag[mine],
        entries.gt[mine],
        entries.weight[mine],
        torch.zeros_like(entries.image[mine]),
    )


def _single_target(targets: Targets, image: int) -> Targets:
    part = slice(image, image + 1)
    return replace(
        targets,
        boxes=targets.boxes[part],
        labels=targets.labels[part],
        content=targets.content[part],
        assigned=targets.assigned[part],
        valid=targets.valid[part],
    )
