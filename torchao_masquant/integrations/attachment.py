# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``quantize_`` leaves on a transformers model, for it to be saved."""

import functools
import sys
from typing import Any, Callable, Iterable, Mapping, Optional

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchao_masquant.options import SolverOptions
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "attach_to_transformers",
    "check_savable",
    "resizing_dense",
    "saving_whole",
]


def attach_to_transformers(
    model: nn.Module,
    linears: Iterable[nn.Module] = (),
    options: Optional[SolverOptions] = None,
    description: Optional[Mapping[str, Any]] = None,
) -> None:
    """Let a model's ``save_pretrained`` write its integers.

    Without effect on a model that is not transformers', or that another quantization
    method of transformers has, but torchao's.

    Args:
        model: that is quantized, in part or whole.
        linears: of the model, those that ``options`` were used for.
        options: None where they are not known.
        description: of the calibration, see :class:`~torchao_masquant.Recipe`.
    """
    # Not imported: where it is not there, the model is none of its.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig
    from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

    quantizer: Any = getattr(model, "hf_quantizer", None)
    # A checkpoint of ours holds torchao's weights too, and not the other way round.
    if quantizer is None or _method_of(quantizer) == "torchao":
        quantizer = MASQuantHfQuantizer(
            MASQuantHfConfig.of_checkpoint(CheckpointFormat.of(model))
        )
        quantizer.options = _options_of_parts(model)
        model.hf_quantizer = quantizer
    if not isinstance(quantizer, MASQuantHfQuantizer):
        return
    # As from_pretrained leaves it, so that transformers refuses what it refuses then.
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    if options is None:
        return
    if description is not None:
        quantizer.description = dict(description)
    changed = set(linears)
    for name, module in model.named_modules():
        if module in changed:
            quantizer.options[name] = options


def _method_of(quantizer: Any) -> str:
    config = getattr(quantizer, "quantization_config", None)
    method = getattr(config, "quant_method", type(quantizer).__name__)
    return str(getattr(method, "value", method))


def _options_of_parts(model: nn.Module) -> dict[str, SolverOptions]:
    """What is known of the linears of parts that were quantized by themselves."""
    return {
        f"{prefix}.{name}": options
        for prefix, part in model.named_modules()
        for name, options in getattr(
            part.__dict__.get("hf_quantizer"), "options", {}
        ).items()
        if prefix
    }


def saving_whole(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """``save_pretrained`` of transformers, for models with quantized parts.

    A part that was quantized by itself knows nothing of the model around it, whose
    ``save_pretrained`` is asked to write it. What cannot be written is refused before
    a file is.
    """

    @functools.wraps(save_pretrained)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        from torchao_masquant.conversion.quantized_modules import quantized_modules
        from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

        if quantized_modules(self):
            attach_to_transformers(self)
            check_savable(self)
        elif isinstance(getattr(self, "hf_quantizer", None), MASQuantHfQuantizer):
            raise ValueError(
                f"{type(self).__name__} has no quantized linear to save: quantize it "
                "with masquant_config(recipe) first."
            )
        return save_pretrained(self, *args, **kwargs)

    return save


def resizing_dense(resize: Callable[..., Any]) -> Callable[..., Any]:
    """``resize_token_embeddings`` of transformers, for models whose head is quantized.

    It would change the embeddings, and then fail at the head.
    """

    @functools.wraps(resize)
    def checked(
        self: Any, new_num_tokens: Optional[int] = None, *args: Any, **kwargs: Any
    ) -> Any:
        head = getattr(self, "get_output_embeddings", lambda: None)()
        weight = getattr(getattr(head, "weight", None), "data", None)
        if new_num_tokens is not None and isinstance(weight, MASQuantTensor):
            raise ValueError(
                f"the output head of {type(self).__name__} is quantized, and rows of it "
                "can't be added or dropped: resize before you quantize, or call "
                "dequantize() first."
            )
        return resize(self, new_num_tokens, *args, **kwargs)

    return checked


def check_savable(model: Any) -> None:
    """Raise where a quantized model's weights cannot be written.

    Args:
        model: that :func:`attach_to_transformers` was called for.

    Raises:
        ValueError: another method has quantized it too; a weight is of a class that
            cannot be stored, or has no values.
    """
    from torchao_masquant.integrations.torchao_tensors import is_torchao

    method = _method_of(model.hf_quantizer)
    kind = type(model).__name__
    if method != "masquant":
        raise ValueError(
            f"{kind} is quantized with {method}, too, which knows nothing of MASQuant's "
            "weights: save the state_dict() with torch.save."
        )
    offloaded = {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values())
    for name, tensor in model.state_dict().items():
        ours = isinstance(tensor, MASQuantTensor) or is_torchao(tensor)
        # A sharded one is gathered first.
        plain = type(tensor) is torch.Tensor or isinstance(tensor, DTensor)
        if isinstance(tensor, torch.Tensor) and not (ours or plain):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}, which no safetensors file can "
                f"hold: quantize {kind} without it, or save the state_dict() with "
                "torch.save."
            )
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            if ours or not offloaded:
                raise ValueError(
                    f"{name} is on the meta device, without values to save: load "
                    f"{kind} without offloading."
                )
