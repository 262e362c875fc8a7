# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized experts on their way from a checkpoint to a layer of vLLM's.

A checkpoint has those of a layer in two tensors' parts. vLLM's models look for a tensor of
each expert, or for all of them in high precision, and many by code of their own. So what is
quantized experts' is taken out before a model sees it, whatever model it is.
"""

from typing import Any, Iterable, Iterator, Mapping

import torch

from torchao_masquant.integrations.checkpoint_format import stored_part
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.vllm_plugin.loading import (
    built,
    columns_of_rank,
    loaded_before,
    own_copy,
)
from torchao_masquant.vllm_plugin.names import own_name

__all__ = ["ExpertLoading", "hand_over"]


def hand_over(
    weights: Iterable[tuple[str, torch.Tensor]], layers: "Iterable[ExpertLoading]"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give quantized experts what a checkpoint has for them.

    Args:
        weights: name in the checkpoint and tensor.
        layers: of the model.

    Returns:
        All other weights.

    Raises:
        ValueError: for a tensor of experts that the quantized ones have no place for; all
            have been loaded before.
    """
    known = {prefix: layer for layer in layers for prefix in layer.prefixes}
    for name, tensor in weights:
        holder, experts, own = own_name(name).rpartition("experts.")
        layer = known.get(f"{holder}{experts}".rstrip("."))
        if layer is None or not layer.takes(own, tensor):
            yield name, tensor


class ExpertLoading:
    """The weights of one layer's experts while a checkpoint is read.

    Args:
        layer: of vLLM.
        formats: name in the checkpoint of each projection to what it is.
        prefixes: own names that the checkpoint's files may have for the experts.
        dtype: that the weights stand for.
    """

    def __init__(
        self,
        layer: Any,
        formats: Mapping[str, LayerFormat],
        prefixes: frozenset[str],
        dtype: torch.dtype,
    ):
        self.prefixes = prefixes
        self._layer, self._dtype, self._formats = layer, dtype, formats
        self._device = torch.get_default_device()
        self._names = {name.rpartition(".")[2]: name for name in formats}
        self._parts: dict[str, dict[str, torch.Tensor]] = {n: {} for n in formats}
        self._weights: dict[str, MASQuantTensor] = {}
        self._is_over = False

    def takes(self, stored: str, tensor: torch.Tensor) -> bool:
        """Take a part of a weight; False: it is none, as a bias of a router is none.

        Args:
            stored: its name in the module of experts, such as "_down_proj_qdata".
            tensor: as it is stored.

        Raises:
            ValueError: it is a weight of these experts in another form; all have been
                loaded before.
        """
        known = stored_part(f"experts.{stored}")
        name = self._names.get(known[0].rpartition(".")[2]) if known else None
        if known is None or name is None:
            first = stored.split(".")[0]
            if first.isdecimal() or first in self._names:
                raise ValueError(
                    f"{self._layer.layer_name}: the experts are quantized, and "
                    f"{stored} is no part of them: save the checkpoint again."
                )
            return False
        if self._is_over:
            raise loaded_before(self._layer.layer_name)
        self._take(name, known[1], tensor)
        return True

    def _take(self, name: str, part: str, tensor: torch.Tensor) -> None:
        parts, known = self._parts[name], self._formats[name]
        parts[part] = tensor
        if len(parts) < len(known.parts):
            return
        piece = self._piece(name, built(name, known, parts, self._dtype))
        self._weights[name] = own_copy(piece, self._device)
        self._parts[name] = {}

    def _piece(self, name: str, weight: MASQuantTensor) -> MASQuantTensor:
        """What this process keeps of a projection: as ``distributed`` cuts linears."""
        parallel = self._layer.moe_config.moe_parallel_config
        rank, pieces = parallel.tp_rank, parallel.tp_size
        if pieces == 1:
            return weight
        if name != list(self._formats)[0]:
            return columns_of_rank(name, weight, rank, pieces)
        # Of the gate as of the other half.
        inner = weight.shape[1] // 2
        size = inner // pieces
        halves = [
            weight[:, start + rank * size : start + (rank + 1) * size]
            for start in (0, inner)
        ]
        piece = torch.cat(halves, 1)
        assert isinstance(piece, MASQuantTensor)
        return piece

    def weights(self) -> tuple[MASQuantTensor, MASQuantTensor]:
        """Both, in the order of their use, which are not held here any longer.

        Raises:
            ValueError: the checkpoint lacks a part.
        """
        for name, known in self._formats.items():
            if name not in self._weights:
                missing = [p for p, _ in known.parts if p not in self._parts[name]]
                raise ValueError(
                    f"{name}: the checkpoint's files lack {missing} of its weight, or "
                    "name the experts of this architecture in a way that is not known "
                    "here."
                )
        up, down = (self._weights[name] for name in self._formats)
        self._weights, self._is_over = {}, True
        return up, down
