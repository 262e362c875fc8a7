# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a quantized cache knows of a model's keys, and its file."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from torchao_masquant.atomic_files import replacing
from torchao_masquant.outputs import CACHE_FILE, CACHE_FORMAT, check_file, kind_of
from torchao_masquant.routed_modules import routers_of_calls
from torchao_masquant.routing import Router, router_of

__all__ = ["CacheRecipe", "SharedLayer", "decoder_layers"]


class SharedLayer(NamedTuple):
    """What is known of a layer's tokens of all modalities, for kernels that know none.

    Attributes:
        key_center: (H, D) float32, the mean of keys.
        key_factor: (H, D) float32, positive: what they are divided by then.
        largest: (2,) float32: no channel of a key, less its centre, divided and rotated, nor
            of a value is larger.
    """

    key_center: torch.Tensor
    key_factor: torch.Tensor
    largest: torch.Tensor

    @property
    def fp8_scales(self) -> tuple[float, float]:
        """What keys and values are divided by to be rounded to e4m3.

        A power of two divides without an error; there is room for twice the largest.
        """
        most = torch.finfo(torch.float8_e4m3fn).max
        key, value = (
            2.0 ** math.ceil(math.log2(max(far, 1e-30) * 2 / most))
            for far in self.largest.tolist()
        )
        return key, value


@dataclass(eq=False)
class CacheRecipe:
    """How the keys of each decoder layer are rounded, of :func:`calibrate_cache`.

    Attributes:
        modalities: names, base first.
        centers: of each layer (M, H, D) float32, the mean of each modality's keys as they
            are cached, with their positions.
        factors: of each layer (M, H, D) float32, positive: what keys are divided by once
            their mean is off.
        shared: of each layer what engines are given; empty where the file was written
            before there was any.
    """

    modalities: tuple[str, ...]
    centers: list[torch.Tensor]
    factors: list[torch.Tensor]
    shared: list[SharedLayer] = field(default_factory=list)

    def new_cache(self, model: nn.Module, bits: int = 8) -> Any:
        """An empty cache, for ``model(..., past_key_values=...)`` and ``generate``.

        Calls of the model tell the cache of which modality their tokens are: one that is
        not quantized, and so does not know, is routed from here on.

        Args:
            model: the one that was calibrated, quantized or not.
            bits: of keys and values, 8 or 4.

        Returns:
            A :class:`transformers.Cache`.

        Raises:
            ValueError: it is another model; other bits.
        """
        # transformers is imported where it is needed: the command line does without.
        from transformers.cache_utils import Cache

        from torchao_masquant.kv_cache.quantized_layer import QuantizedLayer
        from torchao_masquant.kv_cache.rounded_tokens import check_bits

        check_bits(bits)
        found = decoder_layers(model)
        if found != len(self.centers):
            raise ValueError(
                f"the cache was calibrated for a decoder of {len(self.centers)} layers, "
                f"and the model has {found}: it is another model's."
            )
        router = router_of(model)
        if router is None:
            # Of an earlier cache: each call of the model tells every router it has.
            told = (r for r in routers_of_calls(model) if r.is_complete)
            router = next(told, None) or Router.for_model(model)
            router.attach(model)
        return Cache(
            layers=[
                QuantizedLayer(center, factor, self.modalities, router, bits)
                for center, factor in zip(self.centers, self.factors)
            ]
        )

    def save(self, path: Union[str, Path]) -> None:
        """Write it to a safetensors file, whole or not at all; one of its kind is replaced.

        Args:
            path: of the file; or of a quantized folder, in which vLLM looks for it.

        Raises:
            FileNotFoundError: the folder of ``path`` does not exist.
            ValueError: another file is there, such as a model's weights.
        """
        path = _file(path)
        check_file(path, "cache")
        tensors = {
            f"{kind}.{index}": tensor.contiguous()
            for kind in ("centers", "factors")
            for index, tensor in enumerate(getattr(self, kind))
        }
        for index, shared in enumerate(self.shared):
            for part, tensor in shared._asdict().items():
                tensors[f"shared.{index}.{part}"] = tensor.contiguous()
        header = {"format": CACHE_FORMAT, "modalities": json.dumps(self.modalities)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    @classmethod
    def load(cls, path: Union[str, Path]) -> "CacheRecipe":
        """Read what :meth:`save` wrote.

        Args:
            path: of the file, or of the quantized folder that it lies in.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is another file, or damaged.
        """
        path = _file(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no cache recipe {str(path)!r}.")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        if header.get("format") != CACHE_FORMAT:
            raise ValueError(f"{path} is not what calibrate_cache found of a model.")
        layers = range(sum(name.startswith("centers.") for name in tensors))
        has_shared = any(name.startswith("shared.") for name in tensors)
        try:
            modalities = tuple(json.loads(header["modalities"]))
            centers, factors = (
                [tensors[f"{kind}.{i}"] for i in layers]
                for kind in ("centers", "factors")
            )
            shared = [
                SharedLayer(*(tensors[f"shared.{i}.{p}"] for p in SharedLayer._fields))
                for i in (layers if has_shared else ())
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}.") from error
        if not centers or any(len(t) != len(modalities) for t in centers + factors):
            raise ValueError(
                f"{path} is damaged: its layers have not one centre for each of its "
                f"modalities ({', '.join(map(str, modalities))})."
            )
        return cls(modalities, centers, factors, shared)


def _file(path: Union[str, Path]) -> Path:
    """The file that is meant, where a folder may be."""
    path = Path(path)
    return path / CACHE_FILE if kind_of(path) == "model" else path


def decoder_layers(model: nn.Module) -> int:
    """How many layers a model's cache has.

    Raises:
        TypeError: it is none of transformers'.
        ValueError: some attend to a window of tokens, to a state, or to an encoder.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"a cache is for a model of transformers, got a {type(model).__name__}."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder, whose keys would need a cache of their "
            "own: a quantized cache is for models of a decoder alone."
        )
    text = config.get_text_config(decoder=True)
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if others:
        raise ValueError(
            f"{type(model).__name__} has layers of {', '.join(sorted(others))}: a quantized "
            "cache is for decoders whose every layer attends to all tokens."
        )
    return int(text.num_hidden_layers)
