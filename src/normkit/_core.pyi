"""The compiled core (csrc/module.cpp). Addresses are data_ptr()s, 0 for absent; strides count elements.

The last functions take tensors (csrc/calls.cpp) and answer None where these are not plain.
"""

from torch import Tensor

def rows_forward(
    dtype: int,
    rows: int,
    size: int,
    x: int,
    x_inner: int,
    x_outer_stride: int,
    x_inner_stride: int,
    residual: int,
    residual_inner: int,
    residual_outer_stride: int,
    residual_inner_stride: int,
    weight: int,
    weight_dtype: int,
    bias: int,
    bias_dtype: int,
    eps: float,
    centered: bool,
    weight_offset: float,
    out: int,
    total: int,
    mean: int,
    rstd: int,
    threads: int,
    /,
) -> None: ...
def rows_backward(
    dtype: int,
    rows: int,
    size: int,
    dout: int,
    dout_inner: int,
    dout_outer_stride: int,
    dout_inner_stride: int,
    dtotal: int,
    dtotal_inner: int,
    dtotal_outer_stride: int,
    dtotal_inner_stride: int,
    total: int,
    total_inner: int,
    total_outer_stride: int,
    total_inner_stride: int,
    mean: int,
    rstd: int,
    weight: int,
    weight_dtype: int,
    weight_offset: float,
    dx: int,
    dweight: int,
    dbias: int,
    threads: int,
    /,
) -> None: ...
def channels_moments(
    dtype: int,
    batch: int,
    channels: int,
    space: int,
    channels_last: bool,
    mask: int,
    per_sample: bool,
    x: int,
    x_batch_stride: int,
    x_line_stride: int,
    mean: int,
    m2: int,
    threads: int,
    /,
) -> None: ...
def channels_affine(
    dtype: int,
    batch: int,
    channels: int,
    space: int,
    channels_last: bool,
    mask: int,
    x: int,
    x_batch_stride: int,
    x_line_stride: int,
    center: int,
    center_stride: int,
    scale: int,
    scale_stride: int,
    shift: int,
    shift_stride: int,
    out: int,
    out_batch_stride: int,
    out_line_stride: int,
    threads: int,
    /,
) -> None: ...
def channels_backward_moments(
    dtype: int,
    batch: int,
    channels: int,
    space: int,
    channels_last: bool,
    mask: int,
    per_sample: bool,
    dout: int,
    dout_batch_stride: int,
    dout_line_stride: int,
    x: int,
    x_batch_stride: int,
    x_line_stride: int,
    center: int,
    center_stride: int,
    sum: int,
    product: int,
    threads: int,
    /,
) -> None: ...
def channels_backward_affine(
    dtype: int,
    batch: int,
    channels: int,
    space: int,
    channels_last: bool,
    mask: int,
    dout: int,
    dout_batch_stride: int,
    dout_line_stride: int,
    x: int,
    x_batch_stride: int,
    x_line_stride: int,
    center: int,
    center_stride: int,
    a: int,
    a_stride: int,
    b: int,
    b_stride: int,
    c: int,
    c_stride: int,
    out: int,
    out_batch_stride: int,
    out_line_stride: int,
    threads: int,
    /,
) -> None: ...
def bind_torch(functions: dict[str, object], /) -> None: ...
def norm_now(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: object,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    centered: bool,
    weight_offset: float,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def norm_recorded(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
    /,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None: ...
def norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    weight_offset: float,
    dx: bool,
    dweight: bool,
    dbias: bool,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...
def channels_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, /
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...
def channels_normalize_fixed(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, /
) -> Tensor | None: ...
def channels_gradients(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    count: int,
    dx: bool,
    parameters: bool,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...
def norm_backward_now(
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    weight_offset: float,
    dx: bool,
    dweight: bool,
    dbias: bool,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...
def update_running(
    running_mean: Tensor, running_var: Tensor, momentum: float, count: int, mean: Tensor, m2: Tensor, /
) -> bool: ...
def set_block_limit(limit: int, /) -> int: ...
def kept_bytes() -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def openmp() -> bool: ...
