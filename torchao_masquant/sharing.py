# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which quantized linears of a model smooth and quantize the same input alike.

q/k/v, and gate and up, read one tensor and have one smoothing factor. Where a graph is
made of their calls, each is told so by ``smoothed_by``, and the graph quantizes their
input once; or smooths it once, where it stays in 16 bits and a kernel of its own does. Told by mistake it is still right: for a linear beside them that has an
equal smoothing factor and another input, nothing is merged.
"""

from collections import defaultdict

from torch import nn

from torchao_masquant.kernels import shared_prologue
from torchao_masquant.linear import MASQuantLinear, SmoothingSiblings

__all__ = ["share_smoothing"]


def share_smoothing(model: nn.Module) -> None:
    """Tell the quantized linears of a model with whom they share their smoothing.

    ``quantize_`` and loading do so themselves. To be called again after weights were
    written to in place other than by ``load_state_dict``.

    Args:
        model: with quantized linears; those that are children of one module, and of
            one input width, are compared.
    """
    for module in model.modules():
        widths: dict[int, list[MASQuantLinear]] = defaultdict(list)
        for child in module.children():
            if isinstance(child, MASQuantLinear):
                widths[child.in_features].append(child)
        for linears in widths.values():
            if len(linears) > 1:
                SmoothingSiblings(linears)
                shared_prologue.register()
