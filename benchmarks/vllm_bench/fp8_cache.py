# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A cache for transformers that holds what vLLM's holds in e4m3."""

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from torchao_masquant.kv_cache.cache_recipe import CacheRecipe, SharedLayer
from torchao_masquant.kv_cache.rounded_tokens import rotation

__all__ = ["Form", "cut_off", "fp8_cache", "nearest"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def nearest(values: Tensor) -> Tensor:
    """The nearest numbers of e4m3, float32."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float()


def cut_off(values: Tensor) -> Tensor:
    """Those next to them towards zero, as the kernel of vLLM 0.32 for CPUs has it."""
    values = values.clamp(-_LARGEST, _LARGEST)
    # Below 2**-6 steps are those of 2**-6.
    exponent = torch.frexp(values).exponent.clamp_min(-5)
    step = torch.ldexp(torch.ones_like(values), exponent - 4)
    return (values / step).trunc() * step


@dataclass(frozen=True)
class Form:
    """How keys and values are held.

    Attributes:
        rounded: :func:`nearest` or :func:`cut_off`.
        scales: of keys and of values, by what is known of a layer.
        key_center: is taken off keys.
        key_factor: divides them.
        key_rotated: so are keys then.
        value_rotated: so are values, less a centre where they have one.
    """

    rounded: Callable[[Tensor], Tensor] = nearest
    scales: Callable[[SharedLayer], Sequence[float]] = lambda shared: (1.0, 1.0)
    key_center: bool = False
    key_factor: bool = False
    key_rotated: bool = False
    value_rotated: bool = False


class Fp8Layer(DynamicLayer):
    """Rounds what it is given, and gives it back: tokens of a step attend to each other so, too."""

    def __init__(self, form: Form, shared: SharedLayer, value_center: Tensor | None):
        super().__init__()
        self._form, self._shared, self._value_center = form, shared, value_center

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the cache of transformers."""
        form, shared = self._form, self._shared
        factor = shared.key_factor if form.key_factor else None
        center = shared.key_center if form.key_center else None
        keys = self._held(key_states, center, factor, form.key_rotated, 0)
        values = self._held(
            value_states, self._value_center, None, form.value_rotated, 1
        )
        return super().update(keys, values)

    def _held(
        self,
        states: Tensor,
        center: Tensor | None,
        factor: Tensor | None,
        rotated: bool,
        kind: int,
    ) -> Tensor:
        width = states.shape[-1]
        by = back = torch.eye(width)
        if rotated:
            by = rotation(width, states.device)
            # The numbers of the engine's are powers of two.
            odd = ((width & -width).bit_length() - 1) % 2
            by, back = by * 2 ** (odd / 2), by.T / 2 ** (odd / 2)
        taken = 0 if center is None else center[:, None]
        divided = 1 if factor is None else factor[:, None]
        found = ((states - taken) / divided) @ by
        scale = self._form.scales(self._shared)[kind]
        return self._form.rounded(found / scale) * scale @ back * divided + taken


def fp8_cache(
    recipe: CacheRecipe, form: Form, value_centers: Sequence[Tensor] | None = None
) -> Cache:
    """An empty cache.

    Args:
        recipe: of the model.
        form: of all layers.
        value_centers: (H, D) of each layer, that are taken off values; None: none are.
    """
    centers = value_centers or [None] * len(recipe.shared)
    return Cache(
        layers=[Fp8Layer(form, *known) for known in zip(recipe.shared, centers)]
    )
