"""The study's transformer: a causal byte-level language model with any norm in any placement.

Here: Transformer and its sublayers, the norms by name, the initialisations by name.
May import: torch, layers, placement.
Read next: measure.py, which walks its residual stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.layers import BatchNorm1d, DyT, GroupNorm, LayerNorm, RMSNorm
from normkit.placement import Placement, Residual, ResidualStack

EPS = 1e-5  # of every norm: torch's RMSNorm would otherwise take another default than its LayerNorm

NoNorm = Placement("none")  # x + f(x)


class TokenBatchNorm(BatchNorm1d):
    """BatchNorm of (B, T, D), features last: each feature over batch and time, running statistics in eval.

    (B, T, D) seen as (B*T, D) is a view. In training a token's output thereby depends on the whole batch, on later
    tokens too: a language model with it is causal in eval only.
    """

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # tokens have no padding here
        return super().forward(input.flatten(0, -2)).view(input.shape)


class TokenGroupNorm(GroupNorm):
    """GroupNorm of (B, T, D), features last: each group of a token's features on its own."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # tokens have no padding here
        return super().forward(input.flatten(0, -2)).view(input.shape)


GROUPS = 4  # of features; a width that they do not divide is one group

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": lambda width: TokenBatchNorm(width, eps=EPS),
    "layer": lambda width: LayerNorm(width, eps=EPS),
    "rms": lambda width: RMSNorm(width, eps=EPS),
    "group": lambda width: TokenGroupNorm(GROUPS if width % GROUPS == 0 else 1, width, eps=EPS),
    "dyt": lambda width: DyT(width),  # no norm: the comparison without statistics
}


class Attention(nn.Module):
    """Causal multi-head self-attention.

    qk_norm: whether queries and keys are normalized, each head's by an RMSNorm of its own features (Henry et al.,
    "Query-Key Normalization for Transformers", 2020, with a learned gain in place of the temperature).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads, eps=EPS) if qk_norm else None
        self.k_norm = RMSNorm(width // heads, eps=EPS) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, D/H)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return out


class FeedForward(nn.Module):
    """Two linear maps with ReLU between: the theory of skip weights (FIELD, Xiong et al.) is stated for ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


class Transformer(nn.Module):
    """Byte ids (B, T) -> logits (B, T, 256).

    Args:
        depth: blocks; each is two residual sublayers, attention and feed-forward.
        width: features of the stream; a multiple of `heads`.
        seq: the longest T, for the learned positions.
        norm: a name in NORMS; "none" has no placement.
        placement: where the norms sit, in all sublayers or one for each; None exactly for norm "none".
        init: a name in INITS.
        qk_norm: whether attention normalizes queries and keys.

    Every layer is built and initialised on its own: nn.TransformerEncoder copies one layer `depth` times, and its
    layers start out equal. Norms draw no random numbers, so one torch seed gives one set of weights for all norms.

    Raises:
        ValueError: an unknown norm or init, a width that heads do not divide, a placement that does not fit the norm.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        seq: int,
        norm: str,
        placement: Placement | Sequence[Placement] | None,
        init: str = "xavier",
        vocabulary: int = 256,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"Transformer: norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if init not in INITS:
            raise ValueError(f"Transformer: init must be one of {', '.join(INITS)}, got {init!r}")
        if width % heads:
            raise ValueError(f"Transformer: width must be a multiple of heads={heads}, got {width}")
        if norm == "none" and placement is not None:
            raise ValueError(f"Transformer: norm 'none' has no placement, got {_name(placement)!r}")
        if norm != "none" and placement is None:
            raise ValueError(f"Transformer: norm {norm!r} needs a placement, got None")
        everywhere = NoNorm if placement is None else placement
        where = (everywhere,) * (2 * depth) if isinstance(everywhere, Placement) else tuple(everywhere)
        if len(where) != 2 * depth:
            raise ValueError(
                f"Transformer: placement must name {2 * depth} sublayers for depth {depth}, got {len(where)}"
            )

        def norm_of_width() -> nn.Module:
            return NORMS[norm](width)

        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(seq, width)
        sublayers = []
        for attends, feeds in zip(where[::2], where[1::2], strict=True):
            sublayers.append(Residual(Attention(width, heads, qk_norm), attends, norm_of_width, width))
            sublayers.append(Residual(FeedForward(width), feeds, norm_of_width, width))
        final_norm = norm_of_width() if where and where[-1].needs_final_norm else None
        self.stack = ResidualStack(sublayers, final_norm)
        self.head = nn.Linear(width, vocabulary)
        self.apply(INITS[init])
        for sublayer in sublayers:
            _apply_gain(sublayer)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): what enters the residual stack."""
        embedded: Tensor = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return embedded

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stack(self.embed(ids)))
        return logits

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats per byte, mean over the batch."""
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())

    def block_parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each block: two sublayers and their norms."""
        sublayers = list(self.stack.sublayers)
        pairs = zip(sublayers[::2], sublayers[1::2], strict=True)
        return [[*attention.parameters(), *feed_forward.parameters()] for attention, feed_forward in pairs]


def _xavier(module: nn.Module) -> None:
    """Glorot and Bengio 2010, uniform; biases 0; token and position together enter the stack with variance 1."""
    if isinstance(module, Attention):
        for matrix in module.qkv.weight.detach().chunk(3):  # q, k and v are three square matrices, not one of (3D, D)
            nn.init.xavier_uniform_(matrix)
        nn.init.xavier_uniform_(module.out.weight)
        _zero_biases(module.qkv, module.out)
    elif isinstance(module, FeedForward):
        nn.init.xavier_uniform_(module.up.weight)
        nn.init.xavier_uniform_(module.down.weight)
        _zero_biases(module.up, module.down)
    elif isinstance(module, Transformer):
        nn.init.normal_(module.token.weight, std=0.5**0.5)
        nn.init.normal_(module.position.weight, std=0.5**0.5)
        nn.init.xavier_uniform_(module.head.weight)
        _zero_biases(module.head)


def _torch(module: nn.Module) -> None:
    """What the constructors did: Linear uniform within 1/sqrt(fan_in), biases too; Embedding N(0, 1)."""


def _gpt2(module: nn.Module) -> None:
    """N(0, 0.02) for every matrix and embedding, biases 0 (Radford et al. 2019, without its scaling by depth)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        _zero_biases(module)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def _apply_gain(residual: Residual) -> None:
    """The placement's gain on values, the attention's output and the feed-forward, not on queries and keys."""
    sublayer, gain = residual.sublayer, residual.placement.init_gain
    if gain == 1.0:
        return
    if isinstance(sublayer, Attention):
        scaled = [sublayer.qkv.weight.detach().chunk(3)[2], sublayer.out.weight.detach()]
    elif isinstance(sublayer, FeedForward):
        scaled = [sublayer.up.weight.detach(), sublayer.down.weight.detach()]
    else:
        scaled = []
    for weight in scaled:
        weight.mul_(gain)


def _name(placement: Placement | Sequence[Placement]) -> str:
    return placement.name if isinstance(placement, Placement) else placement[0].name


def _zero_biases(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.zeros_(layer.bias)


INITS: dict[str, Callable[[nn.Module], None]] = {"xavier": _xavier, "torch": _torch, "gpt2": _gpt2}
