"""CWD on the FPN maps of a torchvision detector, as a LightningModule: python lightning_module.py DATA STORE

Needs ``pip install lightning``, and dataset.py beside this file.
"""

from __future__ import annotations

import sys

import lightning
import torch
from dataset import make_loader
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import kdcli


class Student(lightning.LightningModule):
    """An FCOS with a ResNet-18, and the distillation losses as a submodule: their adapter is trained and saved with it."""

    def __init__(self, store: kdcli.Store) -> None:
        super().__init__()
        self.store = store
        neck = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )  # fmt: skip
        self.detector = FCOS(neck, num_classes=len(store.classes), _skip_resize=True)  # pixels stay the teacher's
        self.maps: dict[str, Tensor] = {}
        neck.register_forward_hook(lambda module, inputs, output: self.maps.update(output))
        self.distillation = kdcli.losses("cwd", store=store, student={"features": 256})

    def transfer_batch_to_device(
        self, batch: tuple[Tensor, kdcli.StoredRows], device: torch.device, dataloader_idx: int
    ) -> tuple[Tensor, kdcli.TeacherBatch]:
        """Rows are decoded where they are read."""
        images, rows = batch
        return images.to(device, non_blocking=True), self.store.decode(rows, device=device)

    def training_step(self, batch: tuple[Tensor, kdcli.TeacherBatch], index: int) -> Tensor:
        """The detector's own terms and the distillation's."""
        images, teacher = batch
        targets = [{"boxes": b, "labels": x} for b, x in zip(teacher.boxes, teacher.labels, strict=True)]
        terms = self.detector(list(images / 255), targets)
        terms |= self.distillation({"features@all": teacher.flatten(self.maps.values())}, teacher)
        self.log_dict(terms, batch_size=len(images))
        return torch.stack(list(terms.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over the student and the adapter."""
        return torch.optim.SGD(self.parameters(), lr=0.002, momentum=0.9)


def main(data: str, path: str) -> dict[str, float]:
    """One epoch; returns the last values of the loss terms."""
    store = kdcli.open_store(path, "cwd", data=data)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=35.0,
    )  # fmt: skip
    trainer.fit(Student(store), make_loader(store, batch=4, epoch=0, workers=0, start=None))
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(values)
    return values


if __name__ == "__main__":
    main(*sys.argv[1:3])
