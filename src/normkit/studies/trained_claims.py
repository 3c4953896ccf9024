"""Published claims that need training, or a clock, to be seen.

Here: TRAINED, for the table of claims.py; the settings and the limits were fixed before anything was measured.
May import: torch, study, the other studies' cells.
Read next: claims.py.
"""

from __future__ import annotations

import math
from copy import deepcopy
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from normkit.layers import BatchNorm2d, recompute_statistics
from normkit.studies import batch_size, cost, digits, running, warmup
from normkit.studies.claim import Claim, Measured
from normkit.studies.protocol import Settings
from normkit.study import data
from normkit.study.models import Transformer

DEPTH = 12
RATES = tuple(2.0**power for power in range(-8, 5))
STEPS_A_RATE = 80
EPOCHS = 4


def _text_cell(seed: int, **settings: object) -> Settings:
    shared = {"norm": "layer", "placement": "pre", "depth": 4, "warmup": 25, "steps": 150}
    return {**shared, "width": 32, "batch": 8, "seq": 64, "seed": seed, **settings}


# ---------------------------------------------------------------------------------------------- ends of trainings


def _end_loss(cell: Settings, lr: float) -> float:
    """At most that of guessing, so that a run which diverges has a number."""
    return min(warmup.trained(cell, lr)[1], warmup.guessing(cell))


def _warmup(seed: int) -> Measured:
    found = {str(steps): _end_loss(_text_cell(seed, placement="post", warmup=steps), 3e-3) for steps in (0, 25)}
    return found["0"] - found["25"], found


def _deepnorm(seed: int) -> Measured:
    """Each at the better of two rates: with one rate for both the verdict hangs on which."""
    found = {
        name: min(_end_loss(_text_cell(seed, placement=name, depth=DEPTH), lr) for lr in (1e-3, 3e-3))
        for name in ("post", "deepnorm")
    }
    return found["post"] - found["deepnorm"], found


def _same_loss(seed: int) -> Measured:
    found = {norm: _end_loss(_text_cell(seed, norm=norm), 3e-3) for norm in ("layer", "rms")}
    return found["rms"] - found["layer"], found


# ---------------------------------------------------------------------------------------------- Pre-LN's deep blocks


@lru_cache(maxsize=32)  # four claims look at the same models, 0.6 MB each
def _trained_deep(placement: str, seed: int) -> tuple[Transformer, Tensor, Tensor]:
    """A model of 12 blocks after its training, and a batch that it did not see."""
    cell = _text_cell(seed, placement=placement, depth=DEPTH)
    model, _ = warmup.trained(cell, 3e-3)
    (batch,) = data.spaced_batches(warmup.text().held_out, 8, 64, 1)
    return model, *batch


@torch.no_grad()
def _angles(model: Transformer, ids: Tensor) -> list[float]:
    """Between a block's input and its output, mean over tokens, in units of pi."""
    x, found = model.embed(ids), []
    sublayers = list(model.stack.sublayers)
    for attention, feed_forward in zip(sublayers[::2], sublayers[1::2], strict=True):
        after = feed_forward(attention(x))
        cosine = cosine_similarity(x.double(), after.double(), dim=-1).clamp(-1.0, 1.0)
        found.append(float(cosine.acos().mean()) / math.pi)
        x = after
    return found


@torch.no_grad()
def _loss_without(model: Transformer, ids: Tensor, targets: Tensor, block: int | None) -> float:
    x = model.embed(ids)
    for index, sublayer in enumerate(model.stack.sublayers):
        if index // 2 != block:
            x = sublayer(x)
    x = x if model.stack.final_norm is None else model.stack.final_norm(x)
    return float(cross_entropy(model.head(x).flatten(0, 1), targets.flatten()))


def _late_over_early(values: list[float]) -> float:
    """The last third's mean over the first third's."""
    third = len(values) // 3
    return sum(values[-third:]) / sum(values[:third])


def _deep_angles(seed: int) -> Measured:
    model, ids, _ = _trained_deep("pre", seed)
    angles = _angles(model, ids)
    return _late_over_early(angles), {str(block): angle for block, angle in enumerate(angles, 1)}


def _scaled_angles(seed: int) -> Measured:
    late = {}
    for placement in ("pre", "layernorm-scaling"):
        model, ids, _ = _trained_deep(placement, seed)
        late[placement] = sum(_angles(model, ids)[-DEPTH // 3 :]) / (DEPTH // 3)
    return late["layernorm-scaling"] / late["pre"], late


def _removal(seed: int) -> Measured:
    model, ids, targets = _trained_deep("pre", seed)
    whole = _loss_without(model, ids, targets, None)
    rises = [_loss_without(model, ids, targets, block) - whole for block in range(DEPTH)]
    return _late_over_early(rises), {str(block): rise for block, rise in enumerate(rises, 1)}


def _trained_profile(seed: int) -> Measured:
    model, ids, targets = _trained_deep("pre", seed)
    groups = model.block_parameters()
    taken = iter(torch.autograd.grad(model.loss(ids, targets), [each for group in groups for each in group]))
    found = {
        str(block): math.sqrt(sum(float(next(taken).double().square().sum()) for _ in group))
        for block, group in enumerate(groups, 1)
    }
    return found["1"] / found[str(DEPTH)], found


# ---------------------------------------------------------------------------------------------- BatchNorm on digits


def _learns(norm: str, lr: float, seed: int) -> bool:
    """Whether plain SGD at this rate ends below half wrong answers on the training images."""
    images, labels, _, _ = digits.digits()
    torch.manual_seed(seed)
    model = digits.ConvNet(digits.NORMS[norm])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for taken in islice(digits.batches(len(labels), 64, seed), STEPS_A_RATE):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[taken]), labels[taken])
        if not math.isfinite(float(loss.detach())):
            return False
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return digits.error(model.eval(), images, labels) < 0.5


def _rates(seed: int) -> Measured:
    """The largest rate that learns; the lowest of the ladder where none does."""
    found = {
        norm: max((rate for rate in RATES if _learns(norm, rate, seed)), default=RATES[0]) for norm in ("none", "batch")
    }
    return found["batch"] / found["none"], found


def _small_batches(seed: int) -> Measured:
    shared = {"epochs": EPOCHS, "lr_at_32": 0.05, "seed": seed}
    found = {
        f"{norm} {size}": batch_size._run({**shared, "norm": norm, "batch": size})["test_error"]
        for norm in ("batch", "group")
        for size in (2, 32)
    }
    rises = {norm: found[f"{norm} 2"] - found[f"{norm} 32"] for norm in ("batch", "group")}
    return round(rises["batch"] - rises["group"], 9) + 0.0, found  # shares of 450 images: 0, not 1e-16 or -0


def _lag(seed: int) -> Measured:
    """Distances to the statistics of all training images, of the moving averages and of averages over 1000 images."""
    images, labels, _, _ = digits.digits()
    torch.manual_seed(seed)
    model = digits.ConvNet(lambda channels: BatchNorm2d(channels, eps=digits.EPS, decay=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for taken in islice(digits.batches(len(labels), 32, seed), 200):
        optimizer.zero_grad()
        cross_entropy(model(images[taken]), labels[taken]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    exact, precise = deepcopy(model), deepcopy(model)
    recompute_statistics(exact, torch.split(images, 449))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1000]
    recompute_statistics(precise, torch.split(images[order], 500))
    found = {"moving": running._distance(model, exact), "1000 images": running._distance(precise, exact)}
    return found["moving"] / found["1000 images"], found


def _time_saved(seed: int) -> Measured:
    times = cost._alone({"rows": 2048, "size": 1024, "rounds": 15, "seed": seed})["alone_ms"]
    return 1.0 - times["rms both"] / times["layer both"], times


_SUN = "Sun et al. 2025 (Curse of Depth), arXiv 2502.05795"
_ON_TEXT = "text, width 32, 150 steps"
_END = "end loss (at most that of guessing)"
TRAINED: dict[str, Claim] = {
    "post-warmup": Claim(
        "Post-LN needs a warm-up",
        "Xiong et al. 2020, arXiv 2002.04745, section 3",
        f"{_END} without minus with 25 steps of warm-up, 4 blocks, rate 0.003, {_ON_TEXT}",
        _warmup,
        lambda value: value > 0.05,
        "above 0.05 nats",
        on_text=True,
    ),
    "deepnorm": Claim(
        "Deep Post-LN trains with DeepNorm's alpha and beta, where plain Post-LN does not",
        "Wang et al. 2022 (DeepNet), arXiv 2203.00555",
        f"{_END} of Post-LN minus DeepNorm's, 12 blocks, each at the better rate of 0.001 and 0.003, {_ON_TEXT}",
        _deepnorm,
        lambda value: value > 0.2,
        "above 0.2 nats",
        on_text=True,
    ),
    "batchnorm-rates": Claim(
        "Higher learning rates survive with BatchNorm",
        "Ioffe and Szegedy 2015, section 3.3",
        f"largest rate that learns with BatchNorm over that without, digits, {STEPS_A_RATE} steps of SGD",
        _rates,
        lambda value: value >= 4.0,
        "4 or more",
    ),
    "small-batches": Claim(
        "BatchNorm's error rises as the batch shrinks, GroupNorm's does not",
        "Wu and He 2018, arXiv 1803.08494, figure 1",
        f"rise of the test error from batch 32 to 2, BatchNorm's minus GroupNorm's, digits, {EPOCHS} epochs",
        _small_batches,
        lambda value: value > 0.01,
        "above 0.01",
    ),
    "running-lag": Claim(
        "Moving averages miss the population's statistics by more than averages over 1000 samples do",
        "Wu and Johnson 2021, arXiv 2105.07576, section 3",
        "distance of the moving averages (decay 0.9) over that of averages over 1000 images, digits, 200 steps",
        _lag,
        lambda value: value > 2.0,
        "above 2",
    ),
    "rms-time": Claim(
        "RMSNorm saves 7 % to 64 % of LayerNorm's time",
        "Zhang and Sennrich 2019, arXiv 1910.07467 (of whole models, in the frameworks of 2019)",
        "share of the time of the norm alone that is saved, (2048, 1024), forward and backward, one thread",
        _time_saved,
        lambda value: 0.07 <= value <= 0.64,
        "0.07 to 0.64",
    ),
    "rms-loss": Claim(
        "RMSNorm is as accurate as LayerNorm",
        "Zhang and Sennrich 2019, arXiv 1910.07467",
        f"{_END} of RMSNorm minus LayerNorm's, 4 blocks, rate 0.003, {_ON_TEXT}",
        _same_loss,
        lambda value: abs(value) < 0.05,
        "-0.05 to 0.05 nats",
        on_text=True,
    ),
    "deep-identity": Claim(
        "Pre-LN's deep blocks tend to the identity",
        f"{_SUN}, section 2",
        f"angle between a block's input and output after training, last third over first third of 12, {_ON_TEXT}",
        _deep_angles,
        lambda value: value < 0.7,
        "below 0.7",
        on_text=True,
    ),
    "deep-removal": Claim(
        "Removing a deep Pre-LN block costs less than removing an early one",
        f"{_SUN}, section 2",
        f"rise of the loss without one block, last third over first third of 12, {_ON_TEXT}",
        _removal,
        lambda value: value < 0.7,
        "below 0.7",
        on_text=True,
    ),
    "scaled-identity": Claim(
        "Scaling the norm by 1 / sqrt(l) keeps the deep blocks from the identity",
        f"{_SUN}, section 3",
        f"angle of the last third's blocks with the scaling over that without, 12 blocks, {_ON_TEXT}",
        _scaled_angles,
        lambda value: value > 1.2,
        "above 1.2",
        on_text=True,
    ),
    "pre-trained-profile": Claim(
        "Pre-LN: early layers have the larger gradients after training",
        "Shleifer et al. 2021 (NormFormer), arXiv 2110.09456, section 1",
        f"first block's gradient over the last's, 12 blocks, after training, {_ON_TEXT}",
        _trained_profile,
        lambda value: value > 1.2,
        "above 1.2",
        on_text=True,
    ),
}
