# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A kernel with the types of its arguments and its tiling."""

from dataclasses import dataclass, field
from typing import Any, Mapping

from torchao_masquant.kernels.gpu.launching import TileConfig

__all__ = ["AotCase"]


@dataclass(frozen=True)
class AotCase:
    """One specialization of a kernel, to be compiled without a GPU.

    Attributes:
        name: of the case, such as "int_linear w4 group mixed bf16".
        kernel: what ``@triton.jit`` made.
        signature: name of each argument that is no constexpr to Triton's name of its
            type, such as "*bf16" or "i32".
        constexprs: name to value of the others, without those of ``config``.
        config: the tiling.
        multiplies: which matrix instruction it is to have, by a name that a target has
            one under, such as "int8" or "mxfp4"; empty for any or none.
        divisible: arguments that are multiples of 16, as most sizes and strides of
            real models are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    config: TileConfig
    multiplies: str = ""
    divisible: tuple[str, ...] = field(default=())
