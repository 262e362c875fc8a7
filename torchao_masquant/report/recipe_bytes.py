# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe's linears will weigh, part by part."""

from dataclasses import dataclass
from math import prod

from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, Recipe

__all__ = ["PART_NAMES", "LayerBytes", "layer_bytes", "recipe_bytes"]

#: What the parts of a weight are there for, as :class:`WeightLayout` has it, in words.
PART_NAMES = {
    "integers": "integers",
    "scales": "scales",
    "factors": "smoothing factors",
    "pairs": "low-rank pairs",
    "offsets": "biases and shifts",
}


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


def layer_bytes(
    layer: LayerRecipe, options: SolverOptions, modalities: int
) -> LayerBytes:
    """Bytes that one linear's weight has once it is quantized.

    Whatever tensors the part holds count, as the weight will hold them; the integers and
    their scales, which a part has only where they are not those of round-to-nearest,
    count always.

    Args:
        layer: its part of a recipe.
        options: the recipe's.
        modalities: M.
    """
    sizes = layer.layout(
        options.number_format, modalities, options.low_rank_bits
    ).bytes_by_role()
    return LayerBytes(**sizes, bfloat16=2 * prod(layer.shape))


def recipe_bytes(recipe: Recipe) -> dict[str, LayerBytes]:
    """Linear to its bytes."""
    return {
        name: layer_bytes(layer, recipe.options, len(recipe.modalities))
        for name, layer in recipe.layers.items()
    }
