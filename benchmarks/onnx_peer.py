"""onnxruntime's fused row norms on its CPU provider, bound to preallocated memory: forward only.

Here: a one-node model per norm, and a call without arguments that runs it.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor

OPERATORS = {
    "layer_norm": "LayerNormalization",
    "rms_norm": "SimplifiedLayerNormalization",
    "add_layer_norm": "SkipLayerNormalization",
    "add_rms_norm": "SkipSimplifiedLayerNormalization",
}
TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float64: onnx.TensorProto.DOUBLE}
TYPES[torch.float16] = onnx.TensorProto.FLOAT16


def supported(norm: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the CPU provider has this norm: contiguous x, parameters of its dtype, no bfloat16; add not in double."""
    added_double = norm.startswith("add_") and x.dtype == torch.float64
    return x.is_contiguous() and x.dtype in TYPES and weight.dtype == x.dtype and not added_double


def _model(norm: str, x: Tensor, parameters: dict[str, Tensor], eps: float) -> bytes:
    """One node. Parameters are initializers, which lets the provider prepare them once, as in a deployed model."""
    added = norm.startswith("add_")
    inputs = ["x", "residual"] if added else ["x"]
    outputs = ["out", "", "", "total"] if added else ["out"]
    attributes = {"epsilon": eps} if added else {"epsilon": eps, "axis": -1}
    domain = "com.microsoft" if added else ""
    node = helper.make_node(OPERATORS[norm], [*inputs, *parameters], outputs, domain=domain, **attributes)

    def described(names: list[str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TYPES[x.dtype], list(x.shape)) for name in names if name]

    initializers = [numpy_helper.from_array(values.detach().numpy(), name) for name, values in parameters.items()]
    graph = helper.make_graph([node], norm, described(inputs), described(outputs), initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def forward(
    norm: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Callable[[], None]:
    """A run of `norm` from x into memory allocated here, on torch's number of threads."""
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its idle workers would spin on a core that the next variant needs: with spinning, a tenth of the rounds of every
    # other variant of (64, 1024) took 5 times as long, on 2 cores. It costs onnxruntime about 10 us a call: measured
    # alone, layer_norm took 18 us with and 29 to 42 us without at (64, 1024), 446 and 468 us at (2048, 768).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = _model(norm, x, parameters, eps)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    dtype = x.numpy().dtype
    inputs = {"x": x} if residual is None else {"x": x, "residual": residual}
    outputs = {name: torch.empty_like(x) for name in (("out",) if residual is None else ("out", "total"))}
    for name, values in inputs.items():
        binding.bind_input(name, "cpu", 0, dtype, list(values.shape), values.data_ptr())
    for name, values in outputs.items():
        binding.bind_output(name, "cpu", 0, dtype, list(values.shape), values.data_ptr())

    def call(memory: tuple[object, ...] = (inputs, outputs)) -> None:  # keeps what the addresses point at
        session.run_with_iobinding(binding)

    return call
