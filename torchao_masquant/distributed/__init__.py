# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized models on several devices.

``tensor_parallel`` is looked up when it is asked for: it needs the linears, and these
need this package's operator on distributed weights.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchao_masquant.distributed.parallel_plan import tensor_parallel

__all__ = ["tensor_parallel"]


def __getattr__(name: str) -> Any:
    if name == "tensor_parallel":
        from torchao_masquant.distributed.parallel_plan import tensor_parallel

        return tensor_parallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
