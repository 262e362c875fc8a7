# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``head_bits=8``: the part of a recipe for the output head, which needs no data.

A head reads the tokens that logits are asked for, often the last of a call alone, so that
it cannot know their modalities. Rotated, its input has no outliers that 8 bits would have to
hold, and rounding to nearest is enough (``docs/method.md`` has what it costs).
"""

from typing import Sequence

from torch import nn

from torchao_masquant.models.output_head import output_head
from torchao_masquant.options import NamePatterns, SolverOptions, largest_rotation
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.selection import check_plain, is_named

__all__ = ["head_layers"]

_SCHEME = "w8a8"


def head_layers(
    model: nn.Module,
    options: SolverOptions,
    modalities: Sequence[str],
    exclude: NamePatterns = None,
) -> dict[str, LayerRecipe]:
    """Name of the head to its part; empty where it stays as it is.

    Args:
        model: on any device.
        options: with ``head_bits``.
        modalities: that the model is quantized for, base first.
        exclude: patterns of full names to leave out, which may be the head's.

    Raises:
        ValueError: there is no head, it is no plain linear, or it is quantized in another
            way.
    """
    if options.head_bits == 16:
        return {}
    name, head = output_head(model)
    if is_named(name, exclude):
        return {}
    layer = LayerRecipe.rounded(
        tuple(head.weight.shape),
        scheme=_SCHEME,
        hadamard_size=largest_rotation(head.in_features),
    )
    if not layer.made(head.weight.data, options.number_format, modalities):
        check_plain(name, head)
    return {name: layer}
