"""ResNet-18 and ResNet-50 on 224 x 224 images.

plan trace examples/resnet.py --arg size=50 --hardware v100x8
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# size: blocks per stage, width of the first stage, whether blocks are bottlenecks
SIZES = {
    "tiny": ((1, 1, 1, 1), 8, False),
    "small": ((2, 2, 2, 3), 8, True),
    "18": ((2, 2, 2, 2), 64, False),
    "34": ((3, 4, 6, 3), 64, False),
    "50": ((3, 4, 6, 3), 64, True),
    "101": ((3, 4, 23, 3), 64, True),
}


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm, which keeps the size at stride 1."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.convolutions = nn.ModuleList(
                [
                    convolution(inputs, width, 1),
                    convolution(width, width, 3, stride),
                    convolution(width, outputs, 1),
                ]
            )
        else:
            self.convolutions = nn.ModuleList(
                [convolution(inputs, width, 3, stride), convolution(width, outputs, 3)]
            )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i, conv in enumerate(self.convolutions):
            out = conv(F.relu(out) if i else out)
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...], width: int, bottleneck: bool, classes: int):
        super().__init__()
        self.stem = convolution(3, width, 7, stride=2)
        self.layers = nn.ModuleList()
        channels = width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                self.layers.append(Block(channels, width * 2**stage, stride, bottleneck))
                channels = width * 2**stage * (4 if bottleneck else 1)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(images)), kernel_size=3, stride=2, padding=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=(2, 3)))


def build(size: str = "50", classes: int = 1000) -> nn.Module:
    depths, width, bottleneck = SIZES[size]
    return ResNet(depths, width, bottleneck, classes)


def inputs(batch: int, seq_len: int) -> dict[str, Tensor]:
    return {"images": torch.zeros(batch, 3, 224, 224)}


def targets(batch: int, seq_len: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.long)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


# what `plan verify` builds on a laptop: arguments of `build`, the same structure
TWIN = {"size": "small"}
