# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``from_pretrained`` does with a checkpoint that it quantizes."""

from typing import Any, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.config import MASQuantConfig
from torchao_masquant.conversion.fitting import (
    check_fingerprint,
    fitting_layers,
    quantized_weight,
)
from torchao_masquant.freed_memory import return_freed_memory
from torchao_masquant.integrations.checkpoint_format import parameter_of
from torchao_masquant.integrations.hf_loading import finish_modules, set_parameter
from torchao_masquant.models.experts import experts_of
from torchao_masquant.models.output_head import head_name, stands_alone
from torchao_masquant.quantize import rounding_recipe
from torchao_masquant.routing import Router
from torchao_masquant.selection import check_whole
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["QuantizingLoading"]


class QuantizingLoading:
    """Quantizes each weight as it is loaded.

    Args:
        model: on the meta device, not quantized.
        config: with a recipe, or one that needs none.
        left_out: names of modules as transformers' ``modules_to_not_convert`` has them.

    Raises:
        ValueError: the recipe was made for another model, or nothing is left.
    """

    def __init__(
        self, model: Any, config: MASQuantConfig, left_out: Sequence[str] = ()
    ):
        self.done: set[str] = set()
        #: the first weight that could not be quantized
        self.error: Optional[ValueError] = None
        self._experts = experts_of(model)
        recipe = config.loaded_recipe
        if recipe is None:
            recipe = rounding_recipe(model, config)
            self._layers = recipe.layers
        else:
            given = config.include, config.exclude
            self._layers = fitting_layers(model, recipe, *given)
        self.recipe = recipe
        if left_out:
            self._leave_out(left_out)
        #: the head, where it is quantized: its weight may be that of the embeddings
        head = head_name(model)
        self._head = head if head in self._layers else None
        self._named = {
            parameter_of(name, layer.shape): name
            for name, layer in self._layers.items()
            if name != self._head
        }
        self.router = Router.for_model(model, recipe.modalities)

    def _leave_out(self, names: Sequence[str]) -> None:
        from transformers.quantizers.quantizers_utils import should_convert_module

        self._layers = {
            name: layer
            for name, layer in self._layers.items()
            if should_convert_module(name, list(names))
        }
        if not self._layers:
            raise ValueError(
                f"modules_to_not_convert ({list(names)}) leaves no linear to quantize."
            )
        check_whole(list(self._layers), self._experts)

    @property
    def names(self) -> Sequence[str]:
        """Linears that are to be quantized."""
        return list(self._layers)

    def linear_of(self, weight_name: str) -> Optional[str]:
        """The linear to quantize whose weight has this name, if it is one."""
        return self._named.get(weight_name)

    def nbytes_of(self, name: str, weight: torch.Tensor) -> float:
        """Bytes of a linear's weight once it is quantized."""
        if self.recipe.options.number_format.floats:
            return (
                self._layers[name]
                .layout(
                    self.recipe.options.number_format,
                    len(self.recipe.modalities),
                    self.recipe.options.low_rank_bits,
                )
                .nbytes
            )
        scheme = self._layers[name].number_format(self.recipe.options.number_format)
        packed = scheme.weight_bits <= 4
        integers = weight.numel() * (0.5 if packed else 1)
        parts = self._layers[name].tensors()
        return integers + sum(t.nbytes for part, t in parts.items() if part != "qdata")

    def load(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Quantize a weight that has arrived, in the linear that it is for.

        A weight that the recipe was not made for is remembered in :attr:`error`, and
        neither it nor those after it are kept: transformers would bury an exception
        from here in its report.
        """
        self.done.add(name)
        parameter = parameter_of(name, self._layers[name].shape)
        if self.error is None:
            try:
                set_parameter(model, parameter, self._quantized(name, weight))
                return_freed_memory()
                return
            except ValueError as error:
                self.error = error
        # A stand-in of the right shape that takes no memory.
        nothing = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        set_parameter(model, parameter, nothing)

    def _quantized(self, name: str, weight: torch.Tensor) -> MASQuantTensor:
        layer, recipe = self._layers[name], self.recipe
        if name in self._experts and self._experts[name].module.is_transposed:
            weight = weight.transpose(1, 2)
        check_fingerprint(name, weight, layer)
        return quantized_weight(name, weight, layer, recipe.options, recipe.modalities)

    def finish(self, model: nn.Module) -> None:
        """Give modules whose weights have come the class that computes with them.

        Raises:
            ValueError: a weight could not be quantized, or was not in the checkpoint.
        """
        if self._head is not None:
            head: Any = model.get_submodule(self._head)
            self.load(model, self._head, head.weight.data)
            stands_alone(model, self._head)
        if self.error is not None:
            raise self.error
        missing = [name for name in self._layers if name not in self.done]
        if missing:
            raise ValueError(
                f"{missing[0]} was not quantized, since the checkpoint has no weight "
                "for it of its own: load the model without quantization_config, and "
                "call quantize_."
            )
        finish_modules(model, dict.fromkeys(self._layers, self.router))
