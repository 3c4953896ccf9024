"""Handwritten digits, 8 x 8 pixels, and the small networks that several studies train on them.

Here: `digits`, `ConvNet`, `error`, `batches`.
May import: torch, layers; scikit-learn, for its embedded data.
Read next: batch_size.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from normkit.functional import rms_norm
from normkit.layers import BatchNorm2d, GroupNorm

TRAIN = 1347  # of 1797 images; the rest is the test set
GROUPS = 4
EPS = 1e-5


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1347, 1, 8, 8) in [-1, 1] and labels, then those of the test set; one fixed split.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "this study needs the digits that come with scikit-learn, which is not installed; "
            "pip install normkit[study]"
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8.0 - 1.0
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    train, test = order[:TRAIN], order[TRAIN:]
    return images[train], labels[train], images[test], labels[test]


class SampleRMSNorm(nn.Module):
    """RMSNorm of (B, C, H, W): each image by the root mean square of all its values, a gain for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x.flatten(1), x[0].numel(), eps=EPS).view_as(x)
        return normed * self.weight[:, None, None]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": lambda channels: BatchNorm2d(channels, eps=EPS),
    "group": lambda channels: GroupNorm(GROUPS, channels, eps=EPS),
    "layer": lambda channels: GroupNorm(1, channels, eps=EPS),  # all of an image: LayerNorm with a gain per channel
    "rms": SampleRMSNorm,
}


class ConvNet(nn.Sequential):
    """Three convolutions with a norm and ReLU after each, then the mean over positions and a linear map."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        layers: list[nn.Module] = []
        for inside, outside, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
            layers += [nn.Conv2d(inside, outside, 3, stride, padding=1), norm(outside), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches of indices, epoch by epoch; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(count, generator=generator)[: count // batch * batch], batch)


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 450) -> float:
    """The share of wrong answers, in the mode that the model is in, `batch` images at a time."""
    right = 0
    for part, wanted in zip(torch.split(images, batch), torch.split(labels, batch), strict=True):
        if len(part) > 1 or not model.training:
            right += int((model(part).argmax(1) == wanted).sum())
    return 1.0 - right / len(labels)
