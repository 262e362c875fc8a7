# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The ``quantization_config`` of a transformers model."""

import dataclasses
import os
from typing import Any, Optional, Sequence, Union

from torchao.quantization.quantize_.common.quantization_step import QuantizationStep
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchao_masquant.config import MASQuantConfig, masquant_config
from torchao_masquant.integrations.checkpoint_format import (
    QUANT_METHOD,
    CheckpointFormat,
)
from torchao_masquant.recipe import Recipe

__all__ = ["MASQuantHfConfig"]


class MASQuantHfConfig(QuantizationConfigMixin):
    """Quantize a model while transformers loads it::

        AutoModelForImageTextToText.from_pretrained(
            original, quantization_config=MASQuantHfConfig(recipe="recipe.safetensors")
        )

    Each weight is quantized as it arrives, and its full precision freed. A saved
    quantized model needs none of this: ``from_pretrained(folder)`` gives it back.

    Args:
        recipe: what ``calibrate`` found for this model, or the path of one.
        config: in place of a recipe: ``masquant_config(recipe, include=...)``, or a
            ``MASQuantConfig(step="convert", method="rtn", ...)``, the only method that
            needs no calibration.
        modules_to_not_convert: names of modules to leave out, as transformers' own
            methods take them: whole names, their beginnings or ends.

    As a dict, ``quantization_config={"quant_method": "masquant", "recipe": path}``, or in
    place of the recipe fields of a MASQuantConfig, ``{"method": "rtn", "scheme": ...}``.

    Raises:
        ValueError: the config needs a calibration, or not exactly one of the two is
            given.
        FileNotFoundError: there is no recipe at the path.
    """

    def __init__(
        self,
        recipe: Optional[Union[Recipe, str, os.PathLike]] = None,
        config: Optional[MASQuantConfig] = None,
        modules_to_not_convert: Optional[Sequence[str]] = None,
    ):
        if (recipe is None) == (config is None):
            raise ValueError(
                "MASQuantHfConfig takes a recipe from calibrate(), or a config, and one "
                "of them only; a saved quantized model is loaded without it."
            )
        if recipe is not None:
            config = masquant_config(recipe)
        assert config is not None
        _check_without_calibration(config)
        self.quant_method = QUANT_METHOD
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.config: Optional[MASQuantConfig] = config
        self.checkpoint: Optional[CheckpointFormat] = None

    @classmethod
    def of_checkpoint(cls, checkpoint: CheckpointFormat) -> "MASQuantHfConfig":
        """The config of a model that is quantized."""
        self = cls.__new__(cls)
        self.quant_method = QUANT_METHOD
        self.modules_to_not_convert = []
        self.config = None
        self.checkpoint = checkpoint
        return self

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read what :meth:`to_dict` made, or what a user wrote.

        Raises:
            ValueError: a checkpoint's is of another format version, or damaged; a user's
                has a field that there is not, or needs a calibration.
        """
        if "format_version" in config_dict or "layers" in config_dict:
            config = cls.of_checkpoint(CheckpointFormat.from_json(config_dict))
        else:
            config = cls._of_fields(dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _of_fields(cls, given: dict[str, Any]) -> "MASQuantHfConfig":
        given.pop("quant_method", None)
        left_out = given.pop("modules_to_not_convert", None)
        known = {field.name for field in dataclasses.fields(MASQuantConfig)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"quantization_config of method {QUANT_METHOD!r} has no field "
                f"{unknown[0]!r}: give recipe, modules_to_not_convert, or fields of "
                f"MASQuantConfig ({', '.join(sorted(known))})."
            )
        if given.get("recipe", "") is None:
            raise ValueError(
                "the quantization_config was made with a recipe in memory, which a dict "
                "does not hold: save the recipe, and give its path."
            )
        config = MASQuantConfig(**{"step": QuantizationStep.CONVERT, **given})
        return cls(config=config, modules_to_not_convert=left_out)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds; of a model that is to be quantized, what was given."""
        if self.checkpoint is not None:
            return self.checkpoint.to_json()
        assert self.config is not None
        found: dict[str, Any] = {"quant_method": QUANT_METHOD}
        names = [field.name for field in dataclasses.fields(MASQuantConfig)]
        if self.config.recipe is not None:
            # A recipe fixes all other fields.
            names = ["recipe", "include", "exclude"]
            found["recipe"] = None
        for field in dataclasses.fields(MASQuantConfig):
            value = getattr(self.config, field.name)
            # A recipe in memory has no JSON.
            if field.name in names and not isinstance(value, Recipe):
                if value != field.default:
                    found[field.name] = value
        if self.modules_to_not_convert:
            found["modules_to_not_convert"] = self.modules_to_not_convert
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "MASQuantHfConfig":
        # transformers copies configs again and again; a recipe may be as large as the
        # model. Neither part is changed once it is here.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


def _check_without_calibration(config: MASQuantConfig) -> None:
    if config.step != QuantizationStep.CONVERT:
        raise ValueError(
            "a model is quantized while it is loaded with step='convert', not with "
            f"step={config.step!r}."
        )
    if config.recipe is not None:
        return
    if config.options.procedure.smooth:
        raise ValueError(
            f"method {config.method!r} needs a calibration: give a recipe from "
            "calibrate(), or method='rtn'."
        )
