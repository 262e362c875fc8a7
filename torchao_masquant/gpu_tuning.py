# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tilings of the GPU kernels, measured for the linears of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Optional

from torch import nn

from torchao_masquant.linear import MASQuantLinear

if TYPE_CHECKING:
    from torchao_masquant.kernels.gpu.measuring import LinearShape, Measured

__all__ = ["tune_kernels"]


def tune_kernels(
    model: nn.Module,
    tokens: Iterable[int] = (1, 16, 256, 2048),
    *,
    again: bool = False,
    tell: Optional[Callable[["Measured"], None]] = None,
) -> Path:
    """Measure the tilings of the kernels for every quantized linear of a model.

    Linears of one shape and kind are measured once. What wins is written to the table of
    the GPU's architecture in the user's cache, which every later process reads; graphs
    that are compiled already keep what they have.

    Args:
        model: quantized, on a GPU.
        tokens: numbers of tokens; tables round them up to powers of two.
        again: also what the table knows already.
        tell: called with the result of each measurement.

    Returns:
        The table.

    Raises:
        ValueError: the model has no linear that is quantized to integers on a GPU.
        RuntimeError: a tiling gives a wrong result.
    """
    linears = [
        module
        for module in model.modules()
        if isinstance(module, MASQuantLinear)
        and module.weight.device.type == "cuda"
        # Those of floats are measured where they are called, with MASQUANT_TUNE=1.
        and module.weight.act_format is None
    ]
    if not linears:
        raise ValueError(
            "tune_kernels: the model has no quantized linear on a GPU; quantize it, and "
            "move it there."
        )
    # Imported on use: it asks for Triton.
    from torchao_masquant.kernels.gpu.measuring import tune

    counts = list(tokens)
    path: Optional[Path] = None
    for device in {linear.weight.device for linear in linears}:
        for dtype in {linear.weight.dtype for linear in linears}:
            shapes = {
                _shape(linear): None
                for linear in linears
                if (linear.weight.device, linear.weight.dtype) == (device, dtype)
            }
            path = tune(
                shapes,
                counts,
                dtype=dtype,
                device=device,
                again=again,
                tell=tell or (lambda measured: None),
            )
    assert path is not None
    return path


def _shape(linear: MASQuantLinear) -> "LinearShape":
    from torchao_masquant.kernels.gpu.measuring import LinearShape

    weight = linear.weight
    return LinearShape(
        weight.shape[0],
        weight.shape[1],
        weight.weight_bits,
        weight.act_bits,
        weight.group_size if weight.scale.shape[1] > 1 else None,
        0 if weight.l1 is None else weight.l1.shape[1],
        weight.low_rank_bits,
    )
