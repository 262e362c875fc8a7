# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""MASQuant for torchao: modality-aware quantization of multimodal LLMs.

    recipe = calibrate(model, samples, scheme="w4a8")
    quantize_(model, masquant_config(recipe))

Reference: "MASQuant: Modality-Aware Smoothing Quantization for Multimodal Large
Language Models", CVPR 2026, arXiv 2603.04800.
"""

from typing import TYPE_CHECKING, Any

from torchao_masquant.calibration import calibrate, modality_sensitivity
from torchao_masquant.config import MASQuantConfig, masquant_config
from torchao_masquant.evaluation import Analysis, Evaluation, analyze, evaluate
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.gpu_tuning import tune_kernels
from torchao_masquant.integrations import register_integrations
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.recipe import LayerRecipe, Recipe
from torchao_masquant.routing import Router, token_modalities
from torchao_masquant.schemes import SCHEMES, Scheme
from torchao_masquant.tensor_subclasses import MASQuantTensor

if TYPE_CHECKING:
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig
    from torchao_masquant.integrations.save import save_quantized

__all__ = [
    "Analysis",
    "Evaluation",
    "LayerRecipe",
    "MASQuantConfig",
    "MASQuantHfConfig",
    "MASQuantExperts",
    "MASQuantLinear",
    "MASQuantTensor",
    "Recipe",
    "Router",
    "SCHEMES",
    "Scheme",
    "analyze",
    "calibrate",
    "evaluate",
    "masquant_config",
    "modality_sensitivity",
    "save_quantized",
    "token_modalities",
    "tune_kernels",
]

register_integrations()


def __getattr__(name: str) -> Any:
    # What imports transformers, when it is asked for.
    if name == "MASQuantHfConfig":
        from torchao_masquant.integrations.hf_config import MASQuantHfConfig

        return MASQuantHfConfig
    if name == "save_quantized":
        from torchao_masquant.integrations.save import save_quantized

        return save_quantized
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
