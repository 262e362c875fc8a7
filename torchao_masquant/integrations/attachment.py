# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``quantize_`` leaves on a transformers model, for it to be saved."""

import sys
from typing import Any, Iterable, Optional

from torch import nn

from torchao_masquant.solver.methods import SolverOptions

__all__ = ["attach_to_transformers"]


def attach_to_transformers(
    model: nn.Module,
    linears: Iterable[nn.Module] = (),
    options: Optional[SolverOptions] = None,
) -> None:
    """Let a model's ``save_pretrained`` write its integers.

    Without effect on a model that is not transformers', or that another quantization
    method of transformers has: that one writes it.

    Args:
        model: that is quantized, in part or whole.
        linears: of the model, those that ``options`` were used for.
        options: None where they are not known.
    """
    # Not imported: where it is not there, the model is none of its.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig
    from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        quantizer = MASQuantHfQuantizer(
            MASQuantHfConfig.of_checkpoint(CheckpointFormat.of(model))
        )
        model.hf_quantizer = quantizer
    if not isinstance(quantizer, MASQuantHfQuantizer):
        return
    # As from_pretrained leaves it, so that transformers refuses what it refuses then.
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    if options is None:
        return
    changed = set(linears)
    for name, module in model.named_modules():
        if module in changed:
            quantizer.options[name] = options
