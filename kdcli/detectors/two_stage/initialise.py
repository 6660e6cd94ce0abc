"""How mmdet 3.3.0 starts a Faster R-CNN's neck and RoI head; its RPN starts as torchvision's: N(0, 0.01), biases 0.

torchvision draws the neck's weights by their inputs alone, which differs at the lateral convolutions, and leaves the RoI
head to PyTorch's linear layers, which begin with a hundred times the deltas.
"""

from __future__ import annotations

from torch import nn

from kdcli.detectors.two_stage.roi import RoIHead

CLS_STD = 0.01
BOX_STD = 0.001


def initialise(neck: nn.Module, head: RoIHead) -> None:
    """Draw the weights of ``neck`` and ``head`` anew from torch's global generator; biases become 0.

    Xavier uniform in the neck's convolutions and the head's hidden layers, normal in its two outputs: the init_cfg of
    FPN, ConvFCBBoxHead and BBoxHead.
    """
    for module in (*neck.modules(), *head.body.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for layer, std in ((head.cls, CLS_STD), (head.box, BOX_STD)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
