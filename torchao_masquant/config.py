# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The torchao config of MASQuant, and what ``quantize_`` does with it."""

import copy
import os
from dataclasses import InitVar, dataclass
from typing import Any, Optional, Union

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

from torchao_masquant.conversion.base_configs import scheme_of_base_config
from torchao_masquant.conversion.changes import Changes
from torchao_masquant.conversion.torchao_adapter import handle_whole_models
from torchao_masquant.option_fields import shows_options
from torchao_masquant.options import QuantizationOptions
from torchao_masquant.quantize import (
    plan_convert,
    plan_loading,
    plan_prepare,
    plan_recipe,
)
from torchao_masquant.recipe import Recipe

__all__ = ["MASQuantConfig", "masquant_config"]

_STEPS = {
    "prepare": plan_prepare,
    "convert": plan_convert,
    "prepare_for_loading": plan_loading,
}


@dataclass
class _First(AOBaseConfig):
    """The first arguments of a config: dataclasses take fields from the last base on."""

    base_config: InitVar[Union[AOBaseConfig, str, None]] = None
    step: Union[str, QuantizationStep, None] = None


@shows_options
@dataclass
class MASQuantConfig(QuantizationOptions, _First):
    """
    Configuration for MASQuant when passed into quantize_()

    With a recipe (see ``masquant_config``) one call quantizes the model. Without one,
    calibrate in torchao's steps::

        quantize_(model, MASQuantConfig(step="prepare", scheme="w4a8"))
        for sample in samples:
            model(**sample)
        quantize_(model, MASQuantConfig(step="convert", scheme="w4a8"))

    Each step is checked for the whole model before its first linear is changed.

    ``quantize_`` hands linears over, unless its ``filter_fn`` says otherwise; the experts
    of a mixture, whose weights are no linears, are quantized together with the first of
    them. A ``filter_fn`` of the caller's own, and ``FqnToConfig``, choose experts as they
    choose linears: by the module.

    Args:
        base_config: a config of torchao's, in place of ``scheme`` and ``group_size``, as
            AWQConfig and SmoothQuantConfig take it; see
            :func:`~torchao_masquant.conversion.base_configs.scheme_of_base_config`. A step in this
            place is taken as ``step``.
        step: "prepare" (observe the linears), "convert" (quantize them), or
            "prepare_for_loading" (give the linears quantized weights of zeros, to load
            a quantized state_dict into, with ``assign=True``, or in place where the
            other options are those that it was made with).
        {options}
        recipe: what ``calibrate`` found, or the path of one; its options take the
            place of those above. Only a path can be written to JSON
            (``torchao.core.config.config_to_dict``).

    Raises:
        ValueError: an option is out of range, or a recipe meets another step.
        FileNotFoundError: there is no recipe at the path.
    """

    recipe: Optional[Union[Recipe, str, os.PathLike]] = None

    def __post_init__(self, base_config: Union[AOBaseConfig, str, None] = None) -> None:
        if isinstance(base_config, AOBaseConfig):
            self._follow(base_config)
        elif base_config is not None and self.step is None:
            self.step = base_config
        elif base_config is not None:
            raise TypeError(
                f"base_config must be a config of torchao's, got {base_config!r}: give "
                "all else by name, as in MASQuantConfig(step='convert', scheme='w8a8')."
            )
        # A QuantizationStep is a string, too.
        step = getattr(self.step, "value", self.step)
        if str(step).lower() not in _STEPS:
            raise ValueError(f"unknown step {step!r}: choose one of {list(_STEPS)}.")
        self.step = str(step).lower()
        if self.recipe is not None and self.step != "convert":
            raise ValueError(
                f"a recipe is for step='convert', not for step={self.step!r}."
            )
        if isinstance(self.recipe, (str, os.PathLike)):
            self.recipe = os.fspath(self.recipe)
        self._load()
        if self.modalities is not None and not isinstance(self.modalities, str):
            # What torchao writes to JSON; it refuses tuples.
            self.modalities = list(self.modalities)
        # Checks them, and says what those are that were not given.
        for name, value in vars(self.options).items():
            setattr(self, name, value)
        if self.recipe is None and self.budget and self.step == "prepare_for_loading":
            raise ValueError(
                "a budget is spent by what the data shows, so that no weights of zeros can "
                "be made for it: load the checkpoint with from_pretrained, or apply the "
                "recipe."
            )
        for what, option, is_asked in (
            ("learning", "epochs=...", self.epochs > 0),
            (
                "asymmetric calibration",
                "asymmetric_calibration=True",
                self.asymmetric_calibration,
            ),
        ):
            if self.recipe is None and is_asked:
                raise ValueError(
                    f"{what} needs the samples: call calibrate(model, samples, {option}) "
                    "and quantize with its recipe."
                )

    def _follow(self, base_config: AOBaseConfig) -> None:
        """Take the scheme and the group size of a config of torchao's."""
        if self.recipe is not None:
            raise ValueError("a recipe has a scheme: give it without base_config.")
        scheme, group_size = scheme_of_base_config(base_config)
        default = type(self).scheme
        if str(self.scheme).lower() not in (default, scheme):
            raise ValueError(
                f"base_config asks for {scheme!r}, and scheme for {self.scheme!r}: give "
                "one of them."
            )
        if self.group_size is not None and self.group_size != group_size:
            raise ValueError(
                f"base_config asks for a group_size of {group_size}, and group_size is "
                f"{self.group_size}: give one of them."
            )
        self.scheme, self.group_size = scheme, group_size

    def _load(self) -> None:
        """Read the recipe, once, and take over what goes with it."""
        # torchao leaves what begins with an underscore out of its JSON.
        source, loaded = getattr(self, "_loaded", (None, None))
        if source is not self.recipe:
            given = self.recipe
            if isinstance(given, (str, os.PathLike)):
                given = Recipe.load(given)
            loaded = given
            for name, value in _fixed_by(loaded).items():
                setattr(self, name, value)
        for name, value in _fixed_by(loaded).items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"the config's {name} was changed to {getattr(self, name)!r}, and "
                    f"its recipe was made for {value!r}: calibrate again to change it."
                )
        self._loaded = self.recipe, loaded

    def checked(self) -> "MASQuantConfig":
        """What it says now: a copy, whose fields are checked as when it was made.

        Fields may have been assigned to since, as torchao's own steps do with ``step``.

        Raises:
            ValueError: as of the class; an option was changed that a recipe fixes.
        """
        found = copy.copy(self)
        found.__post_init__()
        return found

    @property
    def loaded_recipe(self) -> Optional[Recipe]:
        """The recipe itself, where ``recipe`` may be its path."""
        return self._loaded[1]


def _fixed_by(recipe: Optional[Recipe]) -> dict[str, Any]:
    """Fields of a config that go with a recipe."""
    if recipe is None:
        return {}
    return {
        **vars(recipe.options),
        "modalities": list(recipe.modalities),
        "base_modality": recipe.modalities[0],
    }


def _plan(model: nn.Module, config: MASQuantConfig) -> Changes:
    """What a config changes in a model."""
    config = config.checked()
    if config.loaded_recipe is not None:
        return plan_recipe(model, config.loaded_recipe, config.include, config.exclude)
    return _STEPS[str(config.step)](model, config)


handle_whole_models(MASQuantConfig, _plan)


def masquant_config(
    recipe: Union[Recipe, str, os.PathLike], **overrides: Any
) -> MASQuantConfig:
    """The config that quantizes a model as a recipe says::

        quantize_(model, masquant_config(recipe))

    Args:
        recipe: from ``calibrate``, or the path of a saved one.
        **overrides: ``include`` and ``exclude``, patterns of names that narrow the
            recipe's linears down.

    Raises:
        TypeError: an option that the recipe has fixed.
        FileNotFoundError: there is no recipe at the path.
        ValueError: the file is no recipe.
    """
    fixed = sorted(set(overrides) - {"include", "exclude"})
    if fixed:
        raise TypeError(
            f"masquant_config takes include and exclude beside the recipe, not "
            f"{', '.join(fixed)}: what else there is, the recipe was made for; "
            "calibrate again to change it."
        )
    if not isinstance(recipe, (Recipe, str, os.PathLike)):
        raise TypeError(
            "masquant_config takes a recipe from calibrate(), or the path of one, got "
            f"a {type(recipe).__name__}."
        )
    return MASQuantConfig(step="convert", recipe=recipe, **overrides)
