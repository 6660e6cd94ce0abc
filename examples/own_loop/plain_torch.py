"""PKD on the FPN maps of a torchvision detector, in a plain loop: python plain_torch.py DATA STORE

STORE holds the teacher's features at strides 8 to 128, as ``kdcli cache-teacher --method pkd`` of a GFL writes them.
"""

from __future__ import annotations

import sys

import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import kdcli


def main(data: str, path: str, epochs: int = 1, device: str = "cpu") -> list[float]:
    """Train a student; returns the PKD loss of each step."""
    store = kdcli.open_store(path, "pkd", data=data)
    neck = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    # _skip_resize: pixels stay the teacher's
    student = FCOS(neck, num_classes=len(store.classes), _skip_resize=True).to(device).train()
    maps: dict[str, torch.Tensor] = {}
    student.backbone.register_forward_hook(lambda module, inputs, output: maps.update(output))
    distillation = kdcli.losses("pkd", store=store, student={"features": 256}).to(device)
    parameters = [*student.parameters(), *distillation.parameters()]  # its adapter learns too
    optimizer = torch.optim.SGD(parameters, lr=0.002, momentum=0.9)
    history = []
    for epoch in range(epochs):
        for keys in store.batches(4, epoch=epoch):
            batch = store.read(keys, device=device)
            images = [store.image(*key).to(device) / 255 for key in keys]
            targets = [{"boxes": b, "labels": x} for b, x in zip(batch.boxes, batch.labels, strict=True)]
            terms = student(images, targets)
            terms |= distillation({"features@all": batch.flatten(maps.values())}, batch)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 35.0)
            optimizer.step()
            history.append(float(terms["pkd_loss"]))
            print({name: round(float(term), 3) for name, term in terms.items()})
    return history


if __name__ == "__main__":
    main(*sys.argv[1:3])
