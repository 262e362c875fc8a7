# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Means and sizes of a model's keys and values, from its calls on some data."""

import inspect
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from torchao_masquant.kv_cache.cache_recipe import (
    CacheRecipe,
    SharedLayer,
    decoder_layers,
)
from torchao_masquant.models.parts import token_reader
from torchao_masquant.routing import Router
from torchao_masquant.sample_checks import NEEDED, check_samples, no_samples
from torchao_masquant.samples import run_samples

__all__ = ["calibrate_cache", "center_and_factor"]


class _ObservedLayer(DynamicLayer):
    """Keeps no tokens: counts, sums and squares of the keys of each modality, in float64; and
    of all tokens each channel's least and most, and the largest value."""

    def __init__(self, router: Router):
        super().__init__()
        self._router = router
        self.counts = torch.zeros(len(router.modalities), dtype=torch.int64)
        self.sums: Optional[torch.Tensor] = None
        self.squares: Optional[torch.Tensor] = None
        self.least, self.most = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.largest_value = torch.tensor(0.0)

    def get_seq_length(self) -> int:
        """Each call begins anew."""
        return 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take note of the keys and values of a call, (B, H, S, D)."""
        if self.sums is None or self.squares is None:
            shape = (len(self.counts), key_states.shape[1], key_states.shape[3])
            self.sums = torch.zeros(shape, dtype=torch.float64)
            self.squares = torch.zeros(shape, dtype=torch.float64)
        ids = self._router.ids_for("calibrate_cache", key_states[:, 0])
        keys = key_states.transpose(1, 2).flatten(0, 1).double().cpu()
        if ids is None:
            ids = torch.zeros(len(keys), dtype=torch.int64)
        ids = ids.flatten().cpu()
        for modality in range(len(self.counts)):
            mine = keys[ids == modality]
            self.counts[modality] += len(mine)
            self.sums[modality] += mine.sum(0)
            self.squares[modality] += mine.square().sum(0)
        seen = ids >= 0
        if seen.any():
            self.least = torch.minimum(self.least, keys[seen].amin(0))
            self.most = torch.maximum(self.most, keys[seen].amax(0))
            values = value_states.transpose(1, 2).flatten(0, 1).cpu()[seen]
            self.largest_value = torch.maximum(self.largest_value, values.abs().max())
        return key_states, value_states

    def found(
        self, index: int, modalities: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres and factors."""
        if self.sums is None or self.squares is None:
            raise ValueError(
                f"layer {index} of the decoder gave no keys to the cache: it is one whose "
                "keys are not cached."
            )
        unseen = [m for m, count in zip(modalities, self.counts.tolist()) if not count]
        if unseen:
            raise ValueError(
                f"the samples have no tokens of {', '.join(unseen)}: add samples with them, "
                "or name the modalities that the model will meet in modalities=."
            )
        if not self.squares.isfinite().all():
            raise ValueError(f"a key of layer {index} is nan or inf.")
        return center_and_factor(self.counts[:, None, None], self.sums, self.squares)

    def shared(self, index: int) -> SharedLayer:
        """What is known of the tokens of all modalities, once :meth:`found` has looked."""
        assert self.sums is not None and self.squares is not None
        sums, squares = self.sums.sum(0), self.squares.sum(0)
        center, factor = center_and_factor(self.counts.sum(), sums, squares)
        # In the direction that a rotation makes one channel of, at most.
        far = torch.maximum(self.most - center, center - self.least) / factor
        if not self.largest_value.isfinite():
            raise ValueError(f"a value of layer {index} is nan or inf.")
        largest = torch.stack((far.norm(dim=-1).max(), self.largest_value)).float()
        return SharedLayer(center, factor, largest)


def center_and_factor(
    counts: torch.Tensor, sums: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of keys, and the root of their spread about it, relative to a head's.

    Args:
        counts: of tokens, broadcast to the others.
        sums: (..., H, D) float64, of keys.
        squares: likewise, of their squares.

    Returns:
        Both float32; the geometric mean of a head's factors is 1.
    """
    mean = sums / counts
    spread = (squares / counts - mean.square()).clamp_min(0).sqrt()
    # Channels without a spread, such as of a single token, divide by next to nothing else.
    spread = spread.clamp_min(1e-6 * spread.mean().clamp_min(1e-12))
    factor = spread.sqrt()
    factor = factor / factor.log().mean(-1, keepdim=True).exp()
    return mean.float(), factor.float()


def calibrate_cache(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    *,
    modalities: Optional[Sequence[str]] = None,
    progress: bool = True,
) -> CacheRecipe:
    """Find how to quantize the keys that a model caches, from its calls on some data.

    The samples of :func:`~torchao_masquant.calibrate` will do; the data runs once more. The
    model is left as it was.

    Args:
        model: of transformers, quantized or not, whose decoder layers all attend to all
            tokens.
        samples: its keyword inputs, one dict a call. Padding is left out.
        modalities: names, base first; None for those that its config declares.
        progress: show a bar on a terminal.

    Returns:
        The recipe, on the CPU.

    Raises:
        ValueError: there are no samples; a modality has no tokens; a key or a value is nan
            or inf; layers of the decoder are not for it.
        TypeError: the model is none of transformers', or a sample is none of its inputs.
    """
    check_samples(samples)
    count = decoder_layers(model)
    router = Router.for_model(model, modalities)
    router.skip_padding = True
    layers = [_ObservedLayer(router) for _ in range(count)]
    taken = inspect.signature(token_reader(model).forward).parameters
    # Its name in transformers since 5.24, and before.
    name = "cache" if "cache" in taken else "past_key_values"
    told = {name: Cache(layers=list(layers)), "use_cache": True}
    with router.attached(model):
        ran = run_samples(
            model,
            ({**sample, **told} for sample in samples),
            router,
            progress=progress,
            description="Keys",
        )
    if not ran:
        raise no_samples(samples, "samples", NEEDED)
    found = [layer.found(i, router.modalities) for i, layer in enumerate(layers)]
    centers, factors = map(list, zip(*found))
    shared = [layer.shared(i) for i, layer in enumerate(layers)]
    return CacheRecipe(router.modalities, centers, factors, shared)
