# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What can be told from a model's config and headers, before its weights are loaded."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Optional

from torchao_masquant.cli.models import model_folder
from torchao_masquant.hub import auto_class, meta_model, weight_files
from torchao_masquant.option_values import MEASURE

if TYPE_CHECKING:
    import torch

    from torchao_masquant.config import MASQuantConfig

__all__ = [
    "check_analysis",
    "check_calibration",
    "check_dense",
    "check_quantization",
]


def _skeleton(config: Any, arguments: argparse.Namespace) -> Any:
    """The model of a config, on the meta device; None where none can be made.

    Then loading the weights will tell what is wrong, and better.
    """
    kind = auto_class(config)
    try:
        return meta_model(kind, config, arguments.trust_remote_code)
    except Exception:  # noqa: BLE001 -- of any code
        return None


def check_calibration(
    config: Any, arguments: argparse.Namespace, options: Mapping[str, Any]
) -> None:
    """Raise where a calibration would end with an error that needs no data.

    Args:
        config: of the model.
        arguments: with ``model`` and ``trust_remote_code``.
        options: of :func:`torchao_masquant.calibrate`.

    Raises:
        ValueError: the model is quantized; a pattern matches nothing; a modality is
            not the model's; a group size does not divide the width of a linear.
    """
    from torchao_masquant.calibration.request import check_options

    check_dense(arguments.model, config)
    if options["modality_weights"] == MEASURE:
        options = {**options, "modality_weights": None}
    model = _skeleton(config, arguments)
    if model is not None:
        check_options(model, options)


def check_analysis(config: Any, arguments: argparse.Namespace) -> None:
    """The same of an analysis.

    Args:
        config: of the model.
        arguments: with ``model``, ``include``, ``exclude``, ``modalities`` and
            ``trust_remote_code``.

    Raises:
        ValueError: as above.
    """
    from torchao_masquant.routing import Router
    from torchao_masquant.selection import select_linears

    check_dense(arguments.model, config)
    model = _skeleton(config, arguments)
    if model is not None:
        select_linears(model, arguments.include, arguments.exclude)
        Router.for_model(model, arguments.modalities)


def check_dense(name: str, config: Any) -> None:
    """Raise where a model is quantized.

    Raises:
        ValueError: names the model.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name!r} is quantized already: give the original model.")


def check_quantization(
    config: Any, arguments: argparse.Namespace, quantization: "MASQuantConfig"
) -> None:
    """Raise where a recipe, or patterns, are of another model.

    Names and shapes of all linears are compared, and the values of the smallest that a
    recipe has, where the model is in a folder.

    Args:
        config: of the model.
        arguments: with ``model``, ``dtype`` and ``trust_remote_code``.
        quantization: with a recipe, or one that needs none.

    Raises:
        ValueError: what does not fit.
    """
    from torchao_masquant.integrations.hf_quantizing import QuantizingLoading

    model, recipe = _skeleton(config, arguments), quantization.loaded_recipe
    if model is None:
        return
    QuantizingLoading(model, quantization)
    folder = Path(model_folder(arguments.model))
    if recipe is not None and folder.is_dir():
        _check_fingerprint(model, folder, recipe, arguments.dtype)


def _check_fingerprint(model: Any, folder: Path, recipe: Any, dtype: str) -> None:
    """Compare one weight, the smallest that lies in a file as it is in the model."""
    import safetensors

    from torchao_masquant.conversion.fitting import check_fingerprint
    from torchao_masquant.integrations.stored_names import unchanged_names

    target = _loaded_type(model, dtype)
    if target is None:
        return
    files: dict[str, Path] = {}
    for path in weight_files(folder, pickled=True):
        if path.suffix != ".safetensors":
            return
        with safetensors.safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    stored = unchanged_names(model, list(files))
    linears = sorted(
        (math.prod(layer.shape), name)
        for name, layer in recipe.layers.items()
        if f"{name}.weight" in stored
    )
    for _, name in linears[:1]:
        in_file = stored[f"{name}.weight"]
        with safetensors.safe_open(files[in_file], framework="pt") as file:
            weight = file.get_tensor(in_file).to(target)
        check_fingerprint(name, weight, recipe.layers[name])


def _loaded_type(model: Any, dtype: str) -> "Optional[torch.dtype]":
    """The type that weights will be loaded in; None where they are not all of one."""
    import torch

    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if getattr(model, name, None):
            return None
    if dtype != "auto":
        return getattr(torch, dtype)
    return getattr(model.config, "dtype", None)
