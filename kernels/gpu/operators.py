# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which operators there are Triton kernels for, with what they take and who launches."""

import functools
from typing import Any, Callable, NamedTuple

__all__ = ["GpuOperator", "operators"]


class GpuOperator(NamedTuple):
    """
    Attributes:
        name: without the namespace.
        check: raises on operands that the kernels do not take.
        launch: launches them.
    """

    name: str
    check: Callable[..., None]
    launch: Callable[..., Any]

    def run(self, *args: Any) -> Any:
        """Launch the kernels, or call what a table says is faster than they are."""
        from torchao_masquant.kernels.gpu.library_products import library_product

        product = library_product(self.name, args)
        return self.launch(*args) if product is None else product.run(*args)


@functools.lru_cache(maxsize=None)
def operators() -> dict[str, GpuOperator]:
    """What runs on a GPU, by the operator's name.

    Raises:
        ImportError: Triton is not installed.
    """
    # Not at import: kernels ask for Triton where they are defined.
    from torchao_masquant.kernels.gpu import checks
    from torchao_masquant.kernels.gpu.int_linear import int_linear
    from torchao_masquant.kernels.gpu.low_rank_down import low_rank_down
    from torchao_masquant.kernels.gpu.smooth_quantize import smooth_quantize
    from torchao_masquant.kernels.gpu.weight_only_linear import weight_only_linear

    found = (
        GpuOperator("smooth_quantize", checks.check_smooth_quantize, smooth_quantize),
        GpuOperator("low_rank_down", checks.check_low_rank_down, low_rank_down),
        GpuOperator("int_linear", checks.check_int_linear, int_linear),
        GpuOperator(
            "weight_only_linear", checks.check_weight_only_linear, weight_only_linear
        ),
    )
    return {operator.name: operator for operator in found}
