# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the weights of a model's decoder are, and what they weigh."""

from typing import Optional

import torch
from torch import nn

from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.models.experts import expert_weights
from torchao_masquant.models.parts import decoder_path, heads_of
from torchao_masquant.options import scheme_of_numbers
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["method_of", "quantized_linears", "scheme_of", "weight_bytes"]


def quantized_linears(model: nn.Module) -> dict[str, MASQuantLinear]:
    """Name to module of the quantized linears."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MASQuantLinear)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the decoder's linears and experts, as they are held.

    Biases, ``lm_head`` and the towers in front of the decoder are not counted. A weight
    that several linears share counts once.
    """
    part = model.get_submodule(decoder_path(model))
    heads = {id(head) for head in heads_of(model)}
    weights = {
        id(m.weight): m.weight
        for m in part.modules()
        if isinstance(m, nn.Linear) and id(m) not in heads
    }
    weights |= {id(p): p for p in expert_weights(part).values()}
    return sum(_bytes_held(weight.data) for weight in weights.values())


def _bytes_held(tensor: torch.Tensor) -> int:
    """Of a tensor, or of the plain tensors inside of a subclass."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes_held(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def scheme_of(model: nn.Module) -> Optional[str]:
    """Name of the scheme of a model's quantized linears and experts.

    Returns:
        "mixed" where they differ; None where there are none.
    """
    found = {
        scheme_of_numbers(
            parameter.data.weight_bits,
            parameter.data.act_bits,
            parameter.data.weight_format,
            parameter.data.act_format,
        )
        for parameter in model.parameters()
        if isinstance(parameter.data, MASQuantTensor)
    }
    if not found:
        return None
    if len(found) > 1:
        return "mixed"
    return found.pop()


def method_of(model: nn.Module) -> Optional[str]:
    """Method that a model was quantized by, where that is known and the same for all.

    transformers keeps what quantized a model on the model; the weights of two methods
    can look alike.
    """
    known = getattr(getattr(model, "hf_quantizer", None), "methods", None)
    if known:
        return known.pop() if len(known) == 1 else None
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    method = getattr(getattr(quantization, "quant_type", None), "method", None)
    return method if isinstance(method, str) else None
