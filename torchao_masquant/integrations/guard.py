# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What stops transformers where it does not know of us.

A transformers that finds a ``quant_method`` it does not know warns, skips the
quantization, and gives the weights that it then misses random values. What it never
passes over is a tensor of the wrong shape. So a quantized linear has, beside the parts of
its weight, one of a single byte under the weight's own name; we leave it aside. Linears
that transformers stores in another form (parts of a fused one, say) go without.
"""

import re
from typing import Any, Callable

import torch

from torchao_masquant.tensor_subclasses.weight_layout import TensorKind

__all__ = ["guard", "guardable", "is_guard"]

_KIND: TensorKind = (torch.uint8, (1,))


def guard() -> torch.Tensor:
    """A new one, in memory of its own."""
    dtype, shape = _KIND
    return torch.zeros(shape, dtype=dtype)


def is_guard(kind: TensorKind) -> bool:
    """Whether a stored tensor under a quantized weight's name is one."""
    return kind == _KIND


def guardable(model: Any) -> Callable[[str], bool]:
    """Whether transformers stores a weight of a model as it is, but for its name.

    Args:
        model: of transformers.

    Returns:
        A function of the name of a parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    patterns = [
        re.compile(pattern)
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        for pattern in (*conversion.source_patterns, *conversion.target_patterns)
    ]
    return lambda name: not any(pattern.search(name) for pattern in patterns)
