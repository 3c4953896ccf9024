"""A BatchNorm's numbers from one framework's names and meanings to another's: torch, Keras, Flax.

Here: one layer, several layers, the layers of a model, a layer filled in place.
May import: torch, numpy, _checks, conventions.
Read next: conventions.py, the table; layers/channels.py, the layer that is filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import _checks
from normkit.convert.conventions import CONVENTIONS, Convention, Names, checked_momentum, convention, listed

_FLAX_COLLECTIONS = ("params", "batch_stats")


class _Numbers(NamedTuple):
    """One BatchNorm: vectors of C numbers in memory of their own, None where the layer has none."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    batches: int | None


def batch_norm_state(
    arrays: Mapping[str, Any],
    source: Convention,
    target: Convention,
    *,
    values_per_channel: int | None = None,
) -> dict[str, Any]:
    """Converts one BatchNorm's numbers from the source framework's names and meanings to the target's.

        torch: weight, bias, running_mean, running_var, num_batches_tracked     running_var averages m2 / (n - 1)
        keras: gamma,  beta, moving_mean,  moving_variance                      moving_variance averages m2 / n
        flax:  scale,  bias, mean,         var                                  var averages m2 / n

    There are two faithful conversions of the running variance, and no number is right for both purposes:

    - `values_per_channel=None` copies it. Evaluation gives the source's outputs: what a port of a trained model
      wants. Training that goes on replaces the average, in time, by one of the target's kind.
    - `values_per_channel=n` multiplies it by n / (n - 1) towards torch, by (n - 1) / n away from it: the average that
      the target would have kept, to compare or go on training with. Evaluation then differs from the source's by
      that factor, as the target's own would.

    Args:
        arrays: the numbers by the source's names, one value per channel each: numpy arrays, tensors, or anything that
            `numpy.asarray` takes. weight and bias may be absent, num_batches_tracked too.
        source, target: "torch", "keras" or "flax".
        values_per_channel: n, the values per channel in a training batch (batch size x space), the same in every
            batch; 2 or more. Without effect between Keras and Flax, which agree.

    Returns:
        The numbers by the target's names, in new memory: tensors for torch, numpy arrays for the others. What the
        source lacks stays absent, but torch's num_batches_tracked is 0 where the source counts no batches: it matters
        only to a layer with momentum=None or debiased=True, which would forget these averages at its next batch.

    Raises:
        ValueError: "batch_norm_state: keras names a BatchNorm's numbers moving_mean, moving_variance and, if it has
            them, gamma, beta, got no moving_variance; ...", and the like for other shapes, frameworks and n.
        TypeError: an array holds no floating-point numbers.

    Numerics: dtypes are kept; bfloat16, which numpy lacks, becomes float32 on its way to Keras or Flax. The factor is
        applied in float64 and rounded once. It commutes with training: converted before or after batches of n values,
        the numbers agree to rounding. Of layers that both started at variance 1, the start's remaining weight, decay
        to the power of the steps, is scaled too, so they differ by that / (n - 1).
        Keras 2 (tf.keras) runs 4-D and 5-D inputs through a fused kernel that averages m2 / (n - 1), as torch: there
        copy, whatever the purpose.

    Example:
        >>> import numpy as np, normkit
        >>> keras = {"moving_mean": np.array([0.5]), "moving_variance": np.array([3.0])}
        >>> normkit.convert.batch_norm_state(keras, "keras", "torch", values_per_channel=4)["running_var"]
        tensor([4.], dtype=torch.float64)

    Source: the update rules in keras.layers.BatchNormalization (Keras 3), flax.linen.BatchNorm and
        torch.nn.BatchNorm2d; for Keras 2, TensorFlow issue 55545.
    """
    return _state("batch_norm_state", arrays, source, target, values_per_channel)


def batch_norm_states(
    layers: Mapping[str, Mapping[str, Any]],
    source: Convention,
    target: Convention,
    *,
    values_per_channel: int | Mapping[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Converts several BatchNorms, each under its own name, as `batch_norm_state` converts one.

    Args:
        layers: name -> numbers, as `find_batch_norms` returns them.
        source, target: "torch", "keras" or "flax".
        values_per_channel: None, one n for all, or name -> n for every layer: in a convolutional net n shrinks with
            the resolution.

    Returns:
        The same names, with the target's numbers.

    Raises:
        ValueError, TypeError: as `batch_norm_state`, naming the layer; values_per_channel names other layers.

    Example:
        >>> import torch, normkit
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> found = normkit.convert.find_batch_norms(model.state_dict(), "torch")
        >>> {name: sorted(flax) for name, flax in normkit.convert.batch_norm_states(found, "torch", "flax").items()}
        {'1': ['bias', 'mean', 'scale', 'var']}

    Source: as `batch_norm_state`.
    """
    n = values_per_channel
    if isinstance(n, Mapping) and set(n) != set(layers):
        raise ValueError(
            f"batch_norm_states: values_per_channel must name the layers {listed(layers)}, got {listed(n)}; "
            f"give each layer its own n, or one n for all"
        )
    return {
        name: _state(
            f"batch_norm_states, layer {name!r}", arrays, source, target, n[name] if isinstance(n, Mapping) else n
        )
        for name, arrays in layers.items()
    }


def find_batch_norms(variables: Mapping[Any, Any], source: Convention) -> dict[str, dict[str, Any]]:
    """Picks the BatchNorms out of a whole model's variables: every group that holds a running mean and a variance.

    Args:
        variables: torch's state dict; Keras's variables by path (`{v.path: v.numpy() for v in model.variables}`);
            Flax's nested {"params": ..., "batch_stats": ...}. Nested mappings do, flat ones too, with paths as keys.
        source: "torch", "keras" or "flax".

    Returns:
        name -> numbers, nothing copied. The name is the module's path, joined by "." for torch and "/" for the others;
        Flax's collections are no part of it, as are Keras 2's ":0".

    Raises:
        ValueError: no group holds the two.

    Example:
        >>> import normkit
        >>> flax = {"params": {"norm": {"scale": [1.0]}}, "batch_stats": {"norm": {"mean": [0.0], "var": [1.0]}}}
        >>> normkit.convert.find_batch_norms(flax, "flax")
        {'norm': {'scale': [1.0], 'mean': [0.0], 'var': [1.0]}}
    """
    names = convention("find_batch_norms", "source", source)
    groups: dict[str, dict[str, Any]] = {}
    for path, value in _leaves(variables, names.separator, ()):
        inside = path[1:] if source == "flax" and path[0] in _FLAX_COLLECTIONS else path
        groups.setdefault(names.separator.join(inside[:-1]), {})[inside[-1]] = value
    found = {name: group for name, group in groups.items() if names.mean in group and names.var in group}
    if not found:
        raise ValueError(
            f"find_batch_norms: {source} keeps {names.mean} and {names.var} in a BatchNorm, got no module with both; "
            f"pass the whole model's variables, statistics included"
        )
    return found


def load_batch_norm(
    layer: _BatchNorm,
    arrays: Mapping[str, Any],
    source: Convention,
    *,
    eps: float,
    momentum: float | None = None,
    values_per_channel: int | None = None,
) -> None:
    """Fills a BatchNorm layer, in place, with another framework's numbers; on an error the layer is as it was.

    Args:
        layer: any torch or normkit BatchNorm that keeps running statistics.
        arrays, source, values_per_channel: as in `batch_norm_state`.
        eps: the source layer's epsilon, set on the layer. It has no default since no checkpoint holds it and it
            changes every output: Keras's default is 1e-3, Flax's and torch's 1e-5.
        momentum: the source layer's, in the source's meaning, converted and set on the layer; None leaves the
            layer's. It matters only to training that goes on.

    The batch counter is the source's, 0 where it counts none. A weight that the source lacks becomes 1, a bias 0.

    Raises:
        ValueError: another number of channels; a weight or bias for which the layer has no place; a layer without
            running statistics; a layer with momentum=None or debiased=True, whose next batch would replace
            averages of uncounted batches; what `batch_norm_state` raises.
        TypeError: layer is no BatchNorm.

    Numerics: rounded once, to the layer's dtypes.

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(1)
        >>> keras = {"gamma": [2.0], "beta": [1.0], "moving_mean": [3.0], "moving_variance": [4.0]}
        >>> normkit.convert.load_batch_norm(norm, keras, "keras", eps=0.0, momentum=0.99)
        >>> norm.eval()(torch.tensor([[5.0]])).item(), round(norm.momentum, 6)
        (3.0, 0.01)

    Source: as `batch_norm_state`.
    """
    op = "load_batch_norm"
    if not isinstance(layer, _BatchNorm):
        raise TypeError(f"{op}: layer must be a BatchNorm of torch or normkit, got {type(layer).__name__}; pass one")
    _checks.epsilon(op, eps)
    new_momentum = layer.momentum if momentum is None else checked_momentum(op, momentum, source, "torch")
    numbers = _rescaled(op, _read(op, arrays, source), source, "torch", values_per_channel)
    _check_place(op, layer, numbers, source, new_momentum)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    with torch.no_grad():
        layer.running_mean.copy_(numbers.mean)
        layer.running_var.copy_(numbers.var)
        for parameter, value, neutral in ((layer.weight, numbers.weight, 1.0), (layer.bias, numbers.bias, 0.0)):
            if parameter is not None:
                parameter.fill_(neutral) if value is None else parameter.copy_(value)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(numbers.batches or 0)
    layer.eps, layer.momentum = eps, new_momentum


def _state(
    op: str, arrays: Mapping[str, Any], source: Convention, target: Convention, values_per_channel: int | None
) -> dict[str, Any]:
    names = convention(op, "target", target)
    numbers = _rescaled(op, _read(op, arrays, source), source, target, values_per_channel)
    vectors = zip((names.weight, names.bias, names.mean, names.var), numbers[:4], strict=True)
    present = {name: vector for name, vector in vectors if vector is not None}
    if target != "torch":
        return {name: _to_numpy(vector) for name, vector in present.items()}
    return present | {"num_batches_tracked": torch.tensor(numbers.batches or 0, dtype=torch.int64)}


def _read(op: str, arrays: Mapping[str, Any], source: Convention) -> _Numbers:
    """The numbers by one name each, checked: all there, nothing else, vectors of one length."""
    names = convention(op, "source", source)
    _check_names(op, arrays, source, names)
    mean = _vector(op, names.mean, arrays[names.mean])
    if mean.dim() != 1:
        raise ValueError(
            f"{op}: {names.mean} must be a vector, one value per channel, got shape {_checks.shape_text(mean.shape)}; "
            f"flatten it if its other dimensions are 1"
        )
    others = []
    for name in (names.weight, names.bias, names.var):
        vector = _vector(op, name, arrays[name]) if name in arrays else None
        if vector is not None and vector.shape != mean.shape:
            raise ValueError(
                f"{op}: {name} must have {names.mean}'s shape {_checks.shape_text(mean.shape)}, "
                f"got {_checks.shape_text(vector.shape)}; pass the numbers of one layer"
            )
        others.append(vector)
    weight, bias, var = others
    assert var is not None
    batches = int(arrays[names.batches]) if names.batches and names.batches in arrays else None
    return _Numbers(weight, bias, mean, var, batches)


def _rescaled(
    op: str, numbers: _Numbers, source: Convention, target: Convention, values_per_channel: int | None
) -> _Numbers:
    """The running variance as the target averages it, or as it is without n."""
    n = values_per_channel
    if n is not None and not n >= 2:
        raise ValueError(
            f"{op}: values_per_channel must be 2 or more, got {n}; one value has no unbiased variance, "
            f"pass None to copy the running variance"
        )
    given, wanted = CONVENTIONS[source].unbiased, CONVENTIONS[target].unbiased
    if n is None or given == wanted:
        return numbers
    var = numbers.var.double() * n / (n - 1) if wanted else numbers.var.double() * (n - 1) / n
    return numbers._replace(var=var.to(numbers.var.dtype))


def _check_place(op: str, layer: _BatchNorm, numbers: _Numbers, source: str, momentum: float | None) -> None:
    """The layer has a place for every number, and none of them would be forgotten."""
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"{op}: layer must keep running statistics, got {type(layer).__name__} with track_running_stats=False; "
            f"build it with track_running_stats=True"
        )
    if layer.running_mean.shape != numbers.mean.shape:
        raise ValueError(
            f"{op}: layer must have the source's {numbers.mean.numel()} channels, got num_features="
            f"{layer.num_features}; build it with num_features={numbers.mean.numel()}"
        )
    for name, argument in (("weight", "affine=True"), ("bias", "affine=True, bias=True")):
        if getattr(numbers, name) is not None and getattr(layer, name) is None:
            own = getattr(CONVENTIONS[source], name)
            raise ValueError(f"{op}: layer must have a {name} for {source}'s {own}, got None; build it with {argument}")
    forgetful = momentum is None or getattr(layer, "debiased", False)  # the latter is normkit's own
    if forgetful and numbers.batches is None:
        state = "momentum=None" if momentum is None else "debiased=True"
        advice = "pass the source's momentum" if momentum is None else "build it with debiased=False"
        raise ValueError(
            f"{op}: a layer with {state} weighs its averages by the batches seen, got none counted by {source}; "
            f"{advice}"
        )


def _check_names(op: str, arrays: Mapping[str, Any], source: str, names: Names) -> None:
    """The arrays are named, with every name that is needed and no other."""
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"{op}: arrays must map {source}'s names to numbers, got {type(arrays).__name__}; "
            f"name each array, as in {{{names.mean!r}: ...}}"
        )
    needed, optional = (names.mean, names.var), (names.weight, names.bias) + ((names.batches,) if names.batches else ())
    missing = [name for name in needed if name not in arrays]
    unknown = [repr(name) for name in arrays if name not in needed + optional]
    if not missing and not unknown:
        return
    got = [
        *(["no " + ", no ".join(missing)] if missing else []),
        *(["unknown " + ", ".join(unknown)] if unknown else []),
    ]
    raise ValueError(
        f"{op}: {source} names a BatchNorm's numbers {', '.join(needed)} and, if it has them, {', '.join(optional)}, "
        f"got {' and '.join(got)}; pass one layer's numbers by these names, "
        f"which normkit.convert.find_batch_norms picks out of a whole model"
    )


def _vector(op: str, name: str, value: Any) -> Tensor:
    """A copy of anything array-like as a floating-point tensor of the same dtype."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must hold floating-point numbers, got {value.dtype}; convert it by .float()")
        return value.detach().clone()
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{op}: {name} must hold float16, float32 or float64 numbers, got {array.dtype}; "
            f"convert it by numpy.asarray(value, numpy.float32)"
        )
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _to_numpy(vector: Tensor) -> np.ndarray[Any, Any]:
    if vector.dtype not in (torch.float16, torch.float32, torch.float64):
        vector = vector.float()  # bfloat16 loses nothing
    array: np.ndarray[Any, Any] = vector.cpu().numpy()
    return array


def _leaves(tree: Mapping[Any, Any], separator: str, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in nested mappings; a key may itself be a path, as a tuple or joined."""
    for key, value in tree.items():
        parts = key if isinstance(key, tuple) else str(key).removesuffix(":0").split(separator)
        inside = (*path, *map(str, parts))
        if isinstance(value, Mapping):
            yield from _leaves(value, separator, inside)
        else:
            yield inside, value
