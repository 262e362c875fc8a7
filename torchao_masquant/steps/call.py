# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The call of ``quantize_`` that runs, as the handler of one of its modules sees it.

torchao hands a handler one linear at a time, without the model or the linear's name.
MASQuant needs both: calls are routed at the model, a recipe goes by names, and nothing
may change before everything is checked. So it looks at its caller.
"""

import sys
from typing import Any

from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.quant_api import _is_linear

from torchao_masquant.wrappers import unwrapped

__all__ = ["QuantizeCall", "running_call"]

# Where a call's frame keeps what is known of it. It lives as long as the call, whichever
# way that ends, and no other call, of another thread or model, finds it.
_KEPT_AS = "_masquant_call"


class QuantizeCall:
    """One call of ``quantize_``.

    Attributes:
        model: that it was called with; where that is a compiled one, the original.
        config: that it was called with, which may be an ``FqnToConfig`` of several.
        chooses_linears: whether torchao's own choice of linears is handed over, and not
            that of a caller's ``filter_fn`` or ``FqnToConfig``.
        plans: what will be done, by the ``id`` of each config that takes part.
    """

    def __init__(self, model: nn.Module, config: Any, filter_fn: Any):
        self.model: nn.Module = unwrapped(model)
        self.config = config
        self.chooses_linears = filter_fn is _is_linear
        self.plans: dict[int, Any] = {}


def running_call() -> QuantizeCall:
    """The innermost call of ``quantize_`` on this thread.

    Raises:
        RuntimeError: there is none.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is quantize_.__code__:
            found = frame.f_locals
            if _KEPT_AS not in found:
                found[_KEPT_AS] = QuantizeCall(
                    found["model"], found["config"], found["filter_fn"]
                )
            return found[_KEPT_AS]
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        "MASQuantConfig works through torchao.quantization.quantize_(model, config) "
        "only, since it needs the whole model."
    )
