# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which operators there are Triton kernels for, and how a call of one is run."""

import functools
import inspect
from typing import Any, Callable, NamedTuple

from torchao_masquant.kernels.gpu.checks import check_operands
from torchao_masquant.kernels.library import function_of

__all__ = ["GpuOperator", "operators"]


class GpuOperator(NamedTuple):
    """
    Attributes:
        name: without the namespace.
        launch: launches its kernels.
    """

    name: str
    launch: Callable[..., Any]

    def check(self, *args: Any) -> None:
        """Raise on operands that the kernels do not take."""
        check_operands(self.name, dict(zip(_arguments(self.name), args)))

    def run(self, *args: Any) -> Any:
        """Launch the kernels, or call what a table says is faster than they are."""
        from torchao_masquant.kernels.gpu.library_products import library_product

        product = library_product(self.name, args)
        return self.launch(*args) if product is None else product.run(*args)


@functools.lru_cache(maxsize=None)
def _arguments(name: str) -> tuple[str, ...]:
    return tuple(inspect.signature(function_of(name)).parameters)


@functools.lru_cache(maxsize=None)
def operators() -> dict[str, GpuOperator]:
    """What runs on a GPU, by the operator's name.

    Raises:
        ImportError: Triton is not installed.
    """
    # Not at import: kernels ask for Triton where they are defined.
    from torchao_masquant.kernels.gpu.float_linear import float_linear
    from torchao_masquant.kernels.gpu.float_smooth_quantize import float_smooth_quantize
    from torchao_masquant.kernels.gpu.int_linear import int_linear
    from torchao_masquant.kernels.gpu.low_rank_down import (
        float_low_rank_down,
        low_rank_down,
    )
    from torchao_masquant.kernels.gpu.smooth_quantize import smooth_quantize
    from torchao_masquant.kernels.gpu.weight_only_linear import weight_only_linear

    integers = (smooth_quantize, low_rank_down, int_linear, weight_only_linear)
    floats = (float_smooth_quantize, float_low_rank_down, float_linear)
    launches: tuple[Callable[..., Any], ...] = (*integers, *floats)
    return {f.__name__: GpuOperator(f.__name__, f) for f in launches}
