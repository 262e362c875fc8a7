# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``quantize_`` for configs that are about a whole model.

torchao hands a handler one module at a time, without the model or the module's name.
MASQuant needs both: calls are routed at the model, a recipe goes by names, and nothing may
change before everything is checked. So the handler looks at the frame of ``quantize_``.
No other file knows what is inside of it.
"""

import sys
from typing import Any, Callable

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.quant_api import _is_linear
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_masquant.conversion.changes import Changes
from torchao_masquant.models.wrappers import unwrapped

__all__ = ["handle_whole_models"]

# Where a call's frame keeps what is known of it. It lives as long as the call, whichever
# way that ends, and no other call, of another thread or model, finds it.
_KEPT_AS = "_masquant_call"


class _Call:
    """One call of ``quantize_``.

    Attributes:
        model: that it was called with; where that is a compiled one, the original.
        chooses_linears: whether torchao's own choice of linears is handed over, and not
            that of a caller's ``filter_fn`` or ``FqnToConfig``.
        changes: what is left to do, by the ``id`` of each config that takes part.
    """

    def __init__(self, model: nn.Module, filter_fn: Any):
        self.model = unwrapped(model)
        self.chooses_linears = filter_fn is _is_linear
        self.changes: dict[int, Changes] = {}


def handle_whole_models(
    kind: type[AOBaseConfig], plan: Callable[[nn.Module, Any], Changes]
) -> None:
    """Let ``quantize_`` take configs of a kind.

    Args:
        kind: of config.
        plan: called with the model and the config before the first module is changed. Of
            the changes that it returns those are made whose modules are handed over; and,
            where torchao chooses the modules, those of what are no linears.
    """

    @register_quantize_module_handler(kind)
    def handle(module: nn.Module, config: Any) -> nn.Module:
        call = _running_call(kind.__name__)
        if id(config) not in call.changes:
            call.changes[id(config)] = plan(call.model, config)
        left = call.changes[id(config)]
        chosen = [module] if module in left else []
        if call.chooses_linears:
            chosen += [m for m in left if not isinstance(m, nn.Linear)]
        for each in chosen:
            # Taken out before it runs, not to be run twice.
            left.pop(each)()
        return module


def _running_call(kind: str) -> _Call:
    """The innermost call of ``quantize_`` on this thread."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is quantize_.__code__:
            found = frame.f_locals
            if _KEPT_AS not in found:
                found[_KEPT_AS] = _Call(found["model"], found["filter_fn"])
            return found[_KEPT_AS]
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        f"{kind} works through torchao.quantization.quantize_(model, config) only, since "
        "it needs the whole model."
    )
