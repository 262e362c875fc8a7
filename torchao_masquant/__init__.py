# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""MASQuant for torchao: modality-aware quantization of multimodal LLMs.

    recipe = calibrate(model, samples, scheme="w4a8")
    quantize_(model, masquant_config(recipe))

Names are imported when they are first asked for, and what torch, torchao and
transformers must know of ours is told to each as soon as it is imported itself: the
command line needs none of them to explain itself.

Reference: "MASQuant: Modality-Aware Smoothing Quantization for Multimodal Large
Language Models", CVPR 2026, arXiv 2603.04800.
"""

import importlib
from typing import TYPE_CHECKING, Any

from torchao_masquant.integrations.registration import register_integrations

if TYPE_CHECKING:
    from torchao_masquant.calibrate_in_memory import calibrate
    from torchao_masquant.calibration.sensitivity import modality_sensitivity
    from torchao_masquant.config import MASQuantConfig, masquant_config
    from torchao_masquant.evaluation.analysis import Analysis
    from torchao_masquant.evaluation.analyze import analyze
    from torchao_masquant.evaluation.evaluate import evaluate
    from torchao_masquant.evaluation.evaluation import Evaluation
    from torchao_masquant.expert_modules import MASQuantExperts
    from torchao_masquant.gpu_tuning import tune_kernels
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig
    from torchao_masquant.integrations.save import save_quantized
    from torchao_masquant.kv_cache import CacheRecipe, calibrate_cache
    from torchao_masquant.linear import MASQuantLinear
    from torchao_masquant.options import SCHEMES, Scheme
    from torchao_masquant.recipe import LayerRecipe, Recipe
    from torchao_masquant.routing import Router, token_modalities
    from torchao_masquant.tensor_subclasses import MASQuantTensor

#: pyproject.toml reads it here
__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "CacheRecipe",
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
    "calibrate_cache",
    "evaluate",
    "masquant_config",
    "modality_sensitivity",
    "save_quantized",
    "token_modalities",
    "tune_kernels",
]

_MODULES = {
    "Analysis": "evaluation",
    "CacheRecipe": "kv_cache",
    "Evaluation": "evaluation",
    "LayerRecipe": "recipe",
    "MASQuantConfig": "config",
    "MASQuantHfConfig": "integrations.hf_config",
    "MASQuantExperts": "expert_modules",
    "MASQuantLinear": "linear",
    "MASQuantTensor": "tensor_subclasses",
    "Recipe": "recipe",
    "Router": "routing",
    "SCHEMES": "options",
    "Scheme": "options",
    "analyze": "evaluation",
    "calibrate": "calibrate_in_memory",
    "calibrate_cache": "kv_cache",
    "evaluate": "evaluation",
    "masquant_config": "config",
    "modality_sensitivity": "calibration.sensitivity",
    "save_quantized": "integrations.save",
    "token_modalities": "routing",
    "tune_kernels": "gpu_tuning",
}

register_integrations()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        return getattr(module, name)
    if not name.startswith("_"):
        # A module of the package, such as torchao_masquant.recipe.
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
