# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The two steps of transformers' loading that make quantized weights."""

from typing import Any, Optional

import torch
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps

from torchao_masquant.integrations.hf_loading import CheckpointLoading
from torchao_masquant.integrations.hf_quantizing import QuantizingLoading

__all__ = ["AssembleWeight", "QuantizeWeight"]


class AssembleWeight(ConversionOps):
    """From the stored parts of a weight to the quantized weight."""

    def __init__(self, hf_quantizer: Any):
        # transformers looks for this attribute, and leaves the parts' types alone.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "AssembleWeight":
        # transformers copies the operation for every weight.
        return self

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: Optional[list[str]] = None,
        target_patterns: Optional[list[str]] = None,
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        loading = self.hf_quantizer.loading
        assert isinstance(loading, CheckpointLoading)
        name = loading.linear_of(full_layer_name)
        if name is None and full_layer_name not in loading.torchao:
            raise ValueError(f"{full_layer_name} is no quantized weight.")
        _check_whole(model, full_layer_name)
        prefix = rf"\._{full_layer_name.rpartition('.')[2]}_"
        parts = {
            pattern.removeprefix(prefix): tensors[0]
            for pattern, tensors in input_dict.items()
            # Under the weight's own name is its guard.
            if pattern.startswith(prefix)
        }
        if name is None:
            parameter = loading.load_torchao(model, full_layer_name, parts)
        else:
            parameter = loading.load(model, name, parts)
        return {full_layer_name: parameter}


class QuantizeWeight(ConversionOps):
    """From a loaded weight of full precision to the quantized weight."""

    def __init__(self, loading: QuantizingLoading):
        self.loading = loading

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Optional[list[str]] = None,
        target_patterns: Optional[list[str]] = None,
        *,
        model: Any,
        missing_keys: Optional[set[str]] = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        others: dict[str, Any] = {}
        for key in list(input_dict):
            value = input_dict.pop(key)
            name = self.loading.linear_of(key)
            if name is None:
                others[key] = value
                continue
            _check_whole(model, key)
            weight = value[0] if isinstance(value, list) else value
            self.loading.load(model, name, weight)
            if missing_keys is not None:
                missing_keys.discard(key)
        return others


def _check_whole(model: Any, name: str) -> None:
    """Raise where transformers would load a weight in shards."""
    module, _, parameter = name.rpartition(".")
    if isinstance(getattr(model.get_submodule(module), parameter, None), DTensor):
        raise ValueError(
            f"{name}: quantized weights are not loaded in shards: load the model without "
            "a tensor parallel plan, and call "
            "torchao_masquant.distributed.tensor_parallel(model, mesh)."
        )
