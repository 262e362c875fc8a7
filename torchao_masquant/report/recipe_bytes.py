# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe's linears will weigh, part by part."""

import math
from dataclasses import dataclass

from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, Recipe

__all__ = ["PART_NAMES", "LayerBytes", "layer_bytes", "recipe_bytes"]

# In bytes.
_FLOAT32, _BFLOAT16, _ZERO_POINT = 4, 2, 1

PART_NAMES = {
    "integers": "integers",
    "scales": "scales",
    "factors": "smoothing factors",
    "pairs": "low-rank pairs",
    "offsets": "biases and shifts",
}

_WEIGHT = ("qdata", "scale", "zero_point")
_PART_OF = {"smoothing_factor": "factors", "l1": "pairs", "l2": "pairs"}


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a quantized weight, or of several.

    Attributes:
        integers: packed, two to a byte at 4 bits and fewer.
        scales: float32, with the zero points where there are some.
        factors: float32 smoothing factors.
        pairs: low-rank pairs, of 16 bits, or of 8 with their float32 scales.
        offsets: float32, whatever else there is for each modality: its bias, and the
            shift of its activations.
        bfloat16: the dense weight in bfloat16, for comparison.
    """

    integers: int = 0
    scales: int = 0
    factors: int = 0
    pairs: int = 0
    offsets: int = 0
    bfloat16: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PART_NAMES)

    def __add__(self, other: "LayerBytes") -> "LayerBytes":
        return LayerBytes(
            **{name: value + getattr(other, name) for name, value in vars(self).items()}
        )


def layer_bytes(layer: LayerRecipe, options: SolverOptions) -> LayerBytes:
    """Bytes that one linear's weight has once it is quantized.

    Whatever tensors the part holds count as they are; the integers and their scales,
    which a part has only where they are not those of round-to-nearest, count always.

    Args:
        layer: its part of a recipe.
        options: the recipe's.
    """
    *leading, k = layer.shape
    # Output channels, of all experts where there are several.
    n = math.prod(leading)
    bits = options.number_format
    sizes = {part: 0 for part in PART_NAMES}
    sizes["integers"] = n * (-(-k // 2) if bits.weight_bits <= 4 else k)
    if layer.scale is not None:
        scales = layer.scale.numel()
        zero_points = 0 if layer.zero_point is None else layer.zero_point.numel()
    else:
        scales = n * (1 if bits.group_size is None else k // bits.group_size)
        zero_points = 0 if bits.symmetric else scales
    sizes["scales"] = _FLOAT32 * scales + _ZERO_POINT * zero_points
    for name, tensor in layer.tensors().items():
        if name in _WEIGHT:
            continue
        part = _PART_OF.get(name, "offsets")
        width = options.low_rank_bits // 8 if part == "pairs" else _FLOAT32
        sizes[part] += width * tensor.numel()
    if options.low_rank_bits == 8:
        experts = math.prod(leading[:-1])
        sizes["pairs"] += _FLOAT32 * sum(layer.ranks) * experts
    return LayerBytes(**sizes, bfloat16=_BFLOAT16 * n * k)


def recipe_bytes(recipe: Recipe) -> dict[str, LayerBytes]:
    """Linear to its bytes."""
    return {
        name: layer_bytes(layer, recipe.options)
        for name, layer in recipe.layers.items()
    }
