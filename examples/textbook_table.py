"""The textbook's table, normalized in both directions, step by step.

Two samples (rows) of three features (columns). BatchNorm goes down a column, LayerNorm along a row; the formula
is the same, (x - mean) / sqrt(variance + eps). Run it: python examples/textbook_table.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import normkit

TABLE = torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]])
EPS = 1e-5


def column_statistics(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of every column, as BatchNorm sees them.

    With momentum=1 the running averages forget everything but the last batch: they are that batch's statistics.
    """
    rows, columns = table.shape
    norm = normkit.BatchNorm1d(columns, momentum=1.0, affine=False)
    norm(table)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var * (rows - 1) / rows, norm.running_var


def numbers(values: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())


def show(kind: str, line: Tensor, mean: Tensor, variance: Tensor, normalized: Tensor) -> None:
    """One column or row, from the values to the normalized values."""
    print(f"  {kind}: {numbers(line)}")
    print(f"    mean            = ({' + '.join(f'{v:g}' for v in line.tolist())}) / {len(line)} = {mean:g}")
    print(f"    minus mean      = {numbers(line - mean)}")
    print(f"    variance        = mean of their squares = {variance:.6g}")
    print(f"    divided by root = {', '.join(f'{v:.4f}' for v in normalized.tolist())}")


def main() -> dict[str, list[float]]:
    print(f"The table: {' | '.join(numbers(row) for row in TABLE)}\n")

    print("BatchNorm: down each column, one feature over the samples")
    batch_out = normkit.BatchNorm1d(3, eps=EPS, affine=False)(TABLE)
    column_mean, column_variance, unbiased = column_statistics(TABLE)
    for column in range(3):
        show(
            f"column {column + 1}",
            TABLE[:, column],
            column_mean[column],
            column_variance[column],
            batch_out[:, column],
        )
    print(f"  The running variance keeps the unbiased one, n / (n - 1) times as large: {numbers(unbiased)}\n")

    print("LayerNorm: along each row, one sample over its features")
    layer_out = normkit.LayerNorm(3, eps=EPS, elementwise_affine=False)(TABLE)
    row_mean, row_variance, _ = column_statistics(TABLE.T)  # the rows are the columns of the table turned over
    for row in range(2):
        show(f"row {row + 1}", TABLE[row], row_mean[row], row_variance[row], layer_out[row])
    turned = normkit.BatchNorm1d(2, eps=EPS, affine=False)(TABLE.T).T
    print(f"  BatchNorm of the turned table, turned back, is LayerNorm: {torch.allclose(turned, layer_out)}\n")

    print("RMSNorm: along each row, without subtracting the mean")
    rms_out = normkit.functional.rms_norm(TABLE, 3, eps=EPS)
    rms = (TABLE / rms_out)[:, 0]
    for row in range(2):
        print(f"  row {row + 1}: {numbers(TABLE[row])}")
        print(f"    root of the mean square = {rms[row]:.4f}")
        print(f"    divided by it           = {', '.join(f'{v:.4f}' for v in rms_out[row].tolist())}")

    return {
        "column_mean": column_mean.tolist(),
        "column_variance": column_variance.tolist(),
        "row_mean": row_mean.tolist(),
        "row_variance": row_variance.tolist(),
        "row_rms": rms.tolist(),
        "batch_norm": batch_out.flatten().tolist(),
        "layer_norm": layer_out.flatten().tolist(),
        "rms_norm": rms_out.flatten().tolist(),
    }


if __name__ == "__main__":
    main()
