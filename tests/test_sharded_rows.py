"""Row norms whose rows are split over ranks: what one process computes on whole rows, forward and backward.

All cases of one number of ranks run in one launch; what the ranks found is compared here, with an oracle in NumPy that
is written from the formulas, and with the unsharded functions for second derivatives.
Read next: ranks.py, which launches; src/normkit/functional/sharded.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import normkit
import normkit.functional as F
from normkit.functional import sharded
from ranks import on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch's own, at a graph break
]

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call on whole rows x (*lead, sum of sizes), of which rank i holds sizes[i] columns."""

    name: str
    norm: str = "layer_norm"
    lead: tuple[int, ...] = (7,)
    sizes: tuple[int, ...] = (5, 3, 8)  # of the first ranks
    dtype: torch.dtype = torch.float64
    parameters: torch.dtype | None = torch.float64
    mean: float = 0.5
    scale: float = 2.0
    axes: int = 1  # normalized, the last of them split
    strided: bool = False  # the shard is a view of the whole rows
    arguments: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("layer_norm"),
    Case("rms_norm", "rms_norm"),
    Case("layer_norm, no parameters", parameters=None, arguments=(("eps", 0.1),)),
    Case("rms_norm, no parameters", "rms_norm", parameters=None, lead=(), arguments=(("eps", 0.1),)),
    Case("rms_norm, weight_offset", "rms_norm", lead=(2, 3), arguments=(("weight_offset", 1.0), ("eps", 1e-6))),
    Case("layer_norm, two axes, a view", lead=(3, 2), axes=2, strided=True),
    Case("rms_norm, a view", "rms_norm", strided=True),
    Case("layer_norm, a rank without columns", sizes=(0, 4, 3)),
    Case("rms_norm, a rank without columns", "rms_norm", sizes=(4, 0, 3)),
    Case("layer_norm, no rows", lead=(0, 2)),
    Case("rms_norm, no rows", "rms_norm", lead=(0,)),
    Case("layer_norm, float32", dtype=torch.float32, parameters=torch.float32, lead=(4, 9)),
    Case("rms_norm, float32", "rms_norm", dtype=torch.float32, parameters=torch.float32, lead=(4, 9)),
    Case("layer_norm, many blocks", dtype=torch.float32, parameters=torch.float32, lead=(301,), sizes=(700, 501, 3)),
    Case("rms_norm, many blocks", "rms_norm", lead=(301,), sizes=(700, 501, 3)),
    Case("layer_norm, mean 1e4", dtype=torch.float32, parameters=torch.float32, mean=1e4, scale=1.0),
    Case("layer_norm, mean 1e4 in float64", mean=1e4, scale=1.0),
    Case("layer_norm, 1e38", dtype=torch.float32, parameters=torch.float32, mean=0.0, scale=8e37, lead=(50,)),
    Case("rms_norm, 1e38", "rms_norm", dtype=torch.float32, parameters=torch.float32, mean=0.0, scale=8e37),
    Case("layer_norm, bfloat16", dtype=torch.bfloat16, parameters=torch.bfloat16),
    Case("layer_norm, bfloat16 under float32", dtype=torch.bfloat16, parameters=torch.float32),
    Case("rms_norm, float16 under float32", "rms_norm", dtype=torch.float16, parameters=torch.float32),
    Case("rms_norm, float32 under bfloat16", "rms_norm", dtype=torch.float32, parameters=torch.bfloat16),
)


def whole(case: Case, world: int) -> dict[str, Tensor | None]:
    """x, dout, weight and bias of whole rows, the same in every process."""
    generator = torch.Generator().manual_seed(11)
    size = sum(case.sizes[:world])

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (*case.lead, size)
    made: dict[str, Tensor | None] = {"x": (random(*shape) * case.scale + case.mean).to(case.dtype)}
    made["dout"] = random(*shape).to(case.dtype)
    for name in ("weight", "bias"):
        values = random(*shape[len(shape) - case.axes :])
        with_it = case.parameters is not None and (name == "weight" or case.norm == "layer_norm")
        made[name] = values.to(case.parameters) if with_it else None
    return made


def shard(value: Tensor | None, case: Case, rank: int, world: int) -> Tensor | None:
    if value is None:
        return None
    part = value.split(case.sizes[:world], -1)[rank]
    return part if case.strided else part.contiguous()


def call(case: Case, inputs: dict[str, Tensor | None], **more: Any) -> Tensor:
    x = inputs["x"]
    assert x is not None
    parameters = [inputs["weight"]] if case.norm == "rms_norm" else [inputs["weight"], inputs["bias"]]
    out: Tensor = getattr(F, case.norm)(x, x.shape[-case.axes :], *parameters, **dict(case.arguments), **more)
    return out


def leaves(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}


def computed(case: Case, rank: int, world: int, group: Any) -> Arrays:
    """out, dx, dweight, dbias of one rank, as float64 arrays, and their dtypes."""
    inputs = leaves({name: shard(value, case, rank, world) for name, value in whole(case, world).items()})
    out = call(case, inputs, shard_group=group)
    out.backward(inputs["dout"])
    found = {"out": out} | {
        "d" + name: None if (v := inputs[name]) is None else v.grad for name in ("x", "weight", "bias")
    }
    arrays = {name: None if value is None else value.detach().double().numpy() for name, value in found.items()}
    return arrays | {"dtypes": {name: str(value.dtype) for name, value in found.items() if value is not None}}


def oracle(case: Case, world: int) -> Arrays:
    """The formulas on whole rows in float64, then sums over the rows for the parameters."""
    given = {name: None if v is None else v.double().numpy() for name, v in whole(case, world).items()}
    x, dout, weight, bias = (given[name] for name in ("x", "dout", "weight", "bias"))
    options = dict(case.arguments)
    axes = tuple(range(-case.axes, 0))
    eps = options.get(
        "eps", 1e-5 if case.norm == "layer_norm" else 2.0**-52 if case.dtype == torch.float64 else 2.0**-23
    )
    mean = x.mean(axes, keepdims=True) if case.norm == "layer_norm" else 0.0
    rstd = 1.0 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + eps)
    xhat = (x - mean) * rstd
    gain = 1.0 if weight is None else weight + options.get("weight_offset", 0.0)
    g = dout * gain
    centre = g.mean(axes, keepdims=True) if case.norm == "layer_norm" else 0.0
    rows = tuple(range(x.ndim - case.axes))
    return {
        "out": xhat * gain + (0.0 if bias is None else bias),
        "dx": rstd * (g - centre - xhat * (g * xhat).mean(axes, keepdims=True)),
        "dweight": None if weight is None else (dout * xhat).sum(rows),
        "dbias": None if bias is None else dout.sum(rows),
    }


# ------------------------------------------------------------------------------------- what the ranks do, in one launch


def derivatives(order: int, case: Case, rank: int, world: int, **more: Any) -> list[Any]:
    """Gradients of a weighted sum of gradients, and so on; without `more` of the whole rows."""
    given = whole(case, world)
    if more:
        given = {name: shard(value, case, rank, world) for name, value in given.items()}
    dout = given.pop("dout")
    assert dout is not None
    inputs = leaves(given)
    sources = [value for value in (*inputs.values(), dout.requires_grad_()) if value is not None]
    out = call(case, inputs, **more)
    loss = (out.sin() * dout).sum()
    for _ in range(order - 1):
        gradients = torch.autograd.grad(loss, sources, create_graph=True)
        loss = sum((gradient * gradient.detach().cos()).sum() for gradient in gradients)
    return [gradient.numpy() for gradient in torch.autograd.grad(loss, sources)]


HIGHER = (
    *((2, case) for case in CASES if case.dtype is torch.float64 and "many" not in case.name),
    *((3, case) for case in CASES[:2]),
)


def caught(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def disagreements(rank: int, group: Any) -> dict[str, str]:
    """What this rank is told where one rank differs; each time at a first call."""
    odd = rank == 1
    x = torch.ones(6, 4)
    make = {
        "rows": lambda: normkit.LayerNorm(4, shard_group=group)(x[:5] if odd else x),
        "dtype": lambda: normkit.RMSNorm(4, shard_group=group, dtype=torch.float64)(x.double() if odd else x),
        "norm": lambda: (normkit.LayerNorm if odd else normkit.RMSNorm)(4, shard_group=group)(x),
        "eps": lambda: normkit.LayerNorm(4, 1e-3 if odd else 1e-5, shard_group=group)(x),
        "offset": lambda: normkit.RMSNorm(4, shard_group=group, weight_offset=1.0 if odd else 0.0)(x),
        "gradient": lambda: normkit.RMSNorm(4, shard_group=group)(x.clone().requires_grad_(not odd)),
    }
    found = {"function": caught(lambda: F.layer_norm(x[:5] if odd else x, 4, shard_group=group))}
    for name, function in make.items():
        normkit.LayerNorm(4, shard_group=group)(x)  # the group was compared: the new layer compares once more
        found[name] = caught(function)
    return found


def messages(rank: int, group: Any) -> dict[str, list[tuple[str, int]]]:
    """(collective, numbers) of each call and of its backward, after the first call."""
    sent: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda values, **more: (sent.append(("all_reduce", values.numel())), reduce(values, **more))
    dist.all_gather = lambda found, values, **more: (
        sent.append(("all_gather", values.numel())),
        gather(found, values, **more),
    )
    found = {}
    try:
        for layer in (normkit.LayerNorm(4, shard_group=group), normkit.RMSNorm(4, shard_group=group)):
            for step in ("first", "second"):
                x = torch.randn(2, 3, 4, requires_grad=step == "first")
                sent.clear()
                out = layer(x)
                found[f"{type(layer).__name__} {step}"] = list(sent)
                sent.clear()
                out.sum().backward()
                found[f"{type(layer).__name__} {step} backward"] = list(sent)
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
    return found


def layers(rank: int, world: int, group: Any) -> Arrays:
    """What a sharded layer gives in several ways to call it, each as (out, dx, dweight)."""
    case = Case("layer_norm", dtype=torch.float32, parameters=torch.float32)
    given = {name: shard(value, case, rank, world) for name, value in whole(case, world).items()}
    layer = normkit.LayerNorm(case.sizes[rank], shard_group=group)
    with torch.no_grad():
        layer.weight.copy_(given["weight"])
        layer.bias.copy_(given["bias"])
    regrouped = normkit.LayerNorm(case.sizes[rank])
    regrouped.load_state_dict(layer.state_dict())
    regrouped.shard_group = group
    ways = {
        "layer": layer,
        "deepcopy": copy.deepcopy(layer),
        "copy": copy.copy(layer),
        "regrouped": regrouped,
        "compiled": torch.compile(layer, backend="eager"),
        "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
    }
    found: Arrays = {}
    for name, way in ways.items():
        x = given["x"].clone().requires_grad_()
        weight = getattr(way, "weight", layer.weight)
        weight.grad = None
        out = way(x)
        out.backward(given["dout"])
        found[name] = [value.detach().double().numpy() for value in (out, x.grad, weight.grad)]
    found["pickled"], found["repr"] = caught(lambda: pickle.dumps(layer)), repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = str(layer(given["x"].bfloat16()).dtype)
    with torch.inference_mode():
        found["inference"] = layer(given["x"]).double().numpy()
    return found


def frozen(rank: int, world: int, group: Any) -> Arrays:
    """Gradients where only some arguments take one."""
    case = CASES[0]
    found = {}
    for wanted in (("x",), ("weight",), ("bias",), ("x", "bias")):
        given = {name: shard(value, case, rank, world) for name, value in whole(case, world).items()}
        inputs = {name: value.detach().requires_grad_(name in wanted) for name, value in given.items()}
        call(case, inputs, shard_group=group).backward(given["dout"])
        found[" ".join(wanted)] = {name: None if v.grad is None else v.grad.numpy() for name, v in inputs.items()}
    return found


def everything(rank: int, world: int) -> Arrays:
    group, pairs = dist.group.WORLD, [dist.new_group([i]) for i in range(world)]
    return {
        "cases": {case.name: computed(case, rank, world, group) for case in CASES},
        "alone": {case.name: computed(case, rank, world, pairs[rank]) for case in CASES[:2]},
        "higher": {
            (order, case.name): derivatives(order, case, rank, world, shard_group=group) for order, case in HIGHER
        },
        "disagreements": disagreements(rank, dist.new_group(list(range(world)))),
        "messages": messages(rank, group),
        "layers": layers(rank, world, group),
        "frozen": frozen(rank, world, group),
    }


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def found(request: pytest.FixtureRequest) -> list[Arrays]:
    """What each rank found."""
    return on_ranks(everything, request.param, request.param)


# ---------------------------------------------------------------------------------------------------------- the claims


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_are_those_of_the_whole_rows_with_one_rounding(case: Case, found: list[Arrays]) -> None:
    """Outputs and gradients: the formulas in float64, rounded once to each dtype."""
    world = len(found)
    expected = oracle(case, world)
    for rank in range(world):
        mine = found[rank]["cases"][case.name]
        for name, whole_value in expected.items():
            if whole_value is None:
                assert mine[name] is None
                continue
            wanted = shard(torch.from_numpy(whole_value), case, rank, world)
            dtype = case.dtype if name in ("out", "dx") else case.parameters
            assert mine["dtypes"][name] == str(dtype)
            wide, limits = dtype is torch.float64, torch.finfo(dtype)
            arithmetic = 1e-11 if "mean 1e4" in case.name else 1e-12  # float64 holds deviations from 1e4 to 1e-12
            largest = float(np.abs(whole_value).max(initial=0.0))
            torch.testing.assert_close(
                torch.from_numpy(mine[name]),
                wanted,
                rtol=arithmetic if wide else limits.eps * 0.501,  # half a unit in the last place
                atol=arithmetic * largest + limits.tiny * limits.eps,  # and where that is a subnormal number
                check_stride=False,
            )


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_group_of_one_rank_is_the_ordinary_norm(case: Case, found: list[Arrays]) -> None:
    for rank, results in enumerate(found):
        own = {name: shard(value, case, rank, len(found)) for name, value in whole(case, len(found)).items()}
        inputs = leaves(own)
        call(case, inputs).backward(inputs["dout"])
        close(results["alone"][case.name]["dx"], inputs["x"].grad, 1e-12)
        close(results["alone"][case.name]["dweight"], inputs["weight"].grad, 1e-12)


def close(found: Any, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=tolerance, atol=tolerance, check_stride=False)


@pytest.mark.parametrize(("order", "case"), HIGHER, ids=str)
def test_higher_derivatives_are_those_of_the_whole_rows(order: int, case: Case, found: list[Arrays]) -> None:
    world = len(found)
    expected = [torch.from_numpy(value) for value in derivatives(order, case, 0, world)]
    for rank, results in enumerate(found):
        wanted = [shard(value, case, rank, world) for value in expected]
        for mine, value in zip(results["higher"][order, case.name], wanted, strict=True):
            assert value is not None
            close(mine, value, 1e-7 if "mean 1e4" in case.name else 1e-11)


TOLD = {  # operation on rank 0, what differs, what rank 0 and rank 1 have
    "function": ("layer_norm", "x's number of rows", "6", "5"),
    "rows": ("layer_norm", "x's number of rows", "6", "5"),
    "dtype": ("rms_norm", "x's dtype", "torch.float32", "torch.float64"),
    "norm": ("rms_norm", "the norm", "rms_norm", "layer_norm"),
    "eps": ("layer_norm", "eps", "1e-05", "0.001"),
    "offset": ("rms_norm", "weight_offset", "0", "1"),
    "gradient": ("rms_norm", "whether x takes a gradient", "yes", "no"),
}


@pytest.mark.parametrize("what", TOLD)
def test_ranks_that_disagree_are_all_told_so(what: str, found: list[Arrays]) -> None:
    op, name, first, second = TOLD[what]
    for rank, results in enumerate(found):
        own = "layer_norm" if what == "norm" and rank == 1 else op
        assert results["disagreements"][what] == (
            f"ValueError: {own}: {name} must be the same on all ranks of the process group, got {first} on rank 0 and "
            f"{second} on rank 1; give all ranks of a shard_group the same rows and the same layers"
        )


def test_a_call_sends_one_message_forward_and_one_backward(found: list[Arrays]) -> None:
    """After a layer's first call, which compares. Of 6 rows; without a gradient of x backward sends none."""
    for results in found:
        sent = results["messages"]
        assert sent["LayerNorm first"] == [("all_gather", 6), ("all_gather", 2 * 6 + 1)]  # six facts, then the moments
        assert sent["LayerNorm second"] == [("all_gather", 2 * 6 + 1)]
        assert sent["LayerNorm first backward"] == [("all_reduce", 2 * 6)]
        assert sent["RMSNorm second"] == [("all_reduce", 6 + 1)]
        assert sent["RMSNorm first backward"] == [("all_reduce", 6)]
        assert sent["LayerNorm second backward"] == sent["RMSNorm second backward"] == []


@pytest.mark.parametrize("way", ["layer", "deepcopy", "copy", "regrouped", "compiled", "checkpointed"])
def test_layers_give_the_unsharded_layers_shard(way: str, found: list[Arrays]) -> None:
    case, world = Case("layer_norm", dtype=torch.float32, parameters=torch.float32), len(found)
    expected = oracle(case, world)
    for rank, results in enumerate(found):
        for mine, name in zip(results["layers"][way], ("out", "dx", "dweight"), strict=True):
            wanted = shard(torch.from_numpy(expected[name]), case, rank, world)
            assert wanted is not None
            close(mine, wanted, 1e-6)


def test_layers_print_their_group_and_refuse_to_be_pickled(found: list[Arrays]) -> None:
    for rank, results in enumerate(found):
        mine, twin = results["layers"], repr(torch.nn.LayerNorm(Case("").sizes[rank]))
        assert mine["repr"] == f"{twin[:-1]}, shard_group={len(found)} ranks)"
        assert mine["pickled"] == (
            "TypeError: normkit: a layer's process group lives in its process and cannot be pickled; save the layer's "
            "state_dict() instead"
        )
        assert mine["autocast"] == "torch.bfloat16"
        close(mine["inference"], torch.from_numpy(mine["layer"][0]), 0.0)


def test_only_what_takes_a_gradient_gets_one(found: list[Arrays]) -> None:
    case, world = CASES[0], len(found)
    expected = oracle(case, world)
    for rank, results in enumerate(found):
        for wanted, gradients in results["frozen"].items():
            for name in ("x", "weight", "bias"):
                if name in wanted.split():
                    value = shard(torch.from_numpy(expected["d" + name]), case, rank, world)
                    assert value is not None
                    close(gradients[name], value, 1e-12)
                else:
                    assert gradients[name] is None


# --------------------------------------------------------------------------------------------------- in one process


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("wrong", [3, "tp", [0, 1], dist])
def test_what_is_no_process_group_is_refused(wrong: Any) -> None:
    x = torch.ones(2, 4)
    for op, function in (
        ("layer_norm", lambda: F.layer_norm(x, 4, shard_group=wrong)),
        ("rms_norm", lambda: F.rms_norm(x, 4, shard_group=wrong)),
        ("LayerNorm", lambda: normkit.LayerNorm(4, shard_group=wrong)),
        ("RMSNorm", lambda: normkit.RMSNorm(4, shard_group=wrong)),
    ):
        with pytest.raises(TypeError) as caught:
            function()
        assert str(caught.value) == (
            f"{op}: shard_group must be a process group of torch.distributed that this rank belongs to, got "
            f"{type(wrong).__name__}; pass what torch.distributed.new_group or a DeviceMesh's get_group returned"
        )


def test_the_ordinary_checks_come_first(group: Any) -> None:
    with pytest.raises(ValueError, match="x must end with normalized_shape"):
        F.layer_norm(torch.ones(2, 3), 4, shard_group=group)
    with pytest.raises(TypeError, match=r"got torch\.complex64; normalize x\.real and x\.imag apart"):
        F.rms_norm(torch.ones(2, 3, dtype=torch.complex64), 3, shard_group=group)
    with pytest.raises(ValueError, match="eps must be zero or positive"):
        F.rms_norm(torch.ones(2, 3), 3, eps=-1.0, shard_group=group)


def test_a_distributed_tensor_is_refused(group: Any) -> None:
    """It shards by itself; here the shard is asked for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    spread = distribute_tensor(torch.ones(2, 4), init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError) as caught:
        F.rms_norm(spread, 4, shard_group=group)
    assert str(caught.value) == (
        "rms_norm: x must be this rank's own plain shard where shard_group is given, got DTensor; pass x.to_local(), "
        "or leave shard_group out"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, at a first jvp
def test_transforms_are_refused_and_not_passed_by(group: Any) -> None:
    x = torch.ones(2, 4)
    F.rms_norm(x, 4, shard_group=group)
    for transform in (
        torch.func.grad(lambda x: F.rms_norm(x, 4, shard_group=group).sum()),
        torch.func.vmap(lambda x: F.rms_norm(x, 4, shard_group=group)),
    ):
        with pytest.raises(RuntimeError, match="Function with functorch transforms"):
            transform(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="jvp"):
            F.rms_norm(dual, 4, shard_group=group)


class Taker(Tensor):
    """Takes functions into its own hands."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, kwargs


def test_a_subclass_is_handed_the_group() -> None:
    x, group = torch.ones(2, 4).as_subclass(Taker), object()
    assert F.layer_norm(x, 4, shard_group=group) == (F.layer_norm, {"shard_group": group})
    assert F.rms_norm(x, 4, shard_group=group) == (F.rms_norm, {"shard_group": group})
    assert F.layer_norm(x, 4) == (F.layer_norm, {})


def test_a_profiler_shows_the_usual_label(group: Any) -> None:
    with torch.autograd.profiler.profile() as profile:
        F.layer_norm(torch.ones(2, 4), 4, shard_group=group)
    assert "normkit::layer_norm" in {event.key for event in profile.key_averages()}


def test_nested_rows_are_sharded_too(group: Any) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    found = F.layer_norm(nested, 4, shard_group=group)
    assert found.shape == nested.shape
    torch.testing.assert_close(found.values(), F.layer_norm(nested.values(), 4))


def test_a_residual_block_does_not_fuse_past_the_group(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = sharded.row_norm
    monkeypatch.setattr(sharded, "row_norm", lambda op, *rest: calls.append(op) or real(op, *rest))
    for make in (normkit.LayerNorm, normkit.RMSNorm):
        block = normkit.Residual(torch.nn.Identity(), normkit.PostNorm, lambda make=make: make(4, shard_group=group))
        block(torch.randn(2, 4))
    assert calls == ["layer_norm", "rms_norm"]
