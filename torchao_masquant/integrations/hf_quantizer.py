# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How transformers saves, loads and quantizes a model of ours."""

from typing import Any, Callable, Optional, Union

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from torchao_masquant.integrations.checkpoint_format import (
    CheckpointFormat,
    flatten_state_dict,
)
from torchao_masquant.integrations.dequantizing import dequantize_model
from torchao_masquant.integrations.guard import guardable
from torchao_masquant.integrations.hf_config import MASQuantHfConfig
from torchao_masquant.integrations.hf_loading import CheckpointLoading, attach_routers
from torchao_masquant.integrations.hf_quantizing import QuantizingLoading
from torchao_masquant.integrations.stored_names import model_names
from torchao_masquant.integrations.stored_tensors import stored_tensors
from torchao_masquant.linear import share_smoothing
from torchao_masquant.models.names import named_here
from torchao_masquant.options import SolverOptions

__all__ = ["MASQuantHfQuantizer"]


class MASQuantHfQuantizer(HfQuantizer):
    """transformers' side of a quantized model; ``quantize_`` and ``from_pretrained``
    put one on it.

    Attributes:
        options: name of a linear to the options that it was quantized with, as far as
            they are known.
        description: of the calibration, see :class:`~torchao_masquant.Recipe`.
        loading: what the ``from_pretrained`` that runs does; None outside of one.
    """

    requires_calibration = False
    quantization_config: MASQuantHfConfig

    def __init__(self, quantization_config: MASQuantHfConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.options: dict[str, SolverOptions] = {}
        self.description: dict[str, Any] = {}
        self.loading: Optional[Union[CheckpointLoading, QuantizingLoading]] = None
        self._dtype: Optional[torch.dtype] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "MASQuantHfQuantizer":
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, options=dict(self.options))
        return copied

    # Saving

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What is written to safetensors files; ``config.json`` is made to tell of it."""
        checkpoint = CheckpointFormat.of(model, self.options)
        for name, option in named_here(model, self._saved_options()).items():
            if name in checkpoint.layers:
                checkpoint.options.setdefault(name, option)
        flat = flatten_state_dict(
            model.state_dict(), checkpoint.torchao, guardable(model)
        )
        checkpoint.description = self.description or self._saved_description()
        self.quantization_config = MASQuantHfConfig.of_checkpoint(checkpoint)
        model.config.quantization_config = self.quantization_config  # type: ignore
        return flat, {}

    def _saved_options(self) -> dict[str, dict[str, Any]]:
        """Options that an earlier checkpoint of the model knew."""
        checkpoint = self.quantization_config.checkpoint
        return {} if checkpoint is None else checkpoint.options

    def _saved_description(self) -> dict[str, Any]:
        checkpoint = self.quantization_config.checkpoint
        return {} if checkpoint is None else checkpoint.description

    @property
    def methods(self) -> set[str]:
        """Methods that linears of the model were quantized by, as far as is known."""
        now = {options.method for options in self.options.values()}
        return now | {o["method"] for o in self._saved_options().values()}

    # Loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise where the device map has weights on disk, where they cannot be used."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "quantized weights cannot be offloaded to disk: take the disk out of "
                "device_map."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if config.config is not None:
            self.loading = QuantizingLoading(
                model, config.config, config.modules_to_not_convert
            )
            return
        assert config.checkpoint is not None
        stored = None if checkpoint_files is None else stored_tensors(checkpoint_files)
        self.loading = CheckpointLoading(model, config.checkpoint, stored, self._dtype)

    def param_needs_quantization(
        self, model: Any, param_name: str, **kwargs: Any
    ) -> bool:
        # A saved weight counts too: transformers then takes it in another shape.
        return (
            self.loading is not None and self.loading.linear_of(param_name) is not None
        ) or (
            isinstance(self.loading, CheckpointLoading)
            and param_name in self.loading.torchao
        )

    def param_element_size(
        self, model: Any, param_name: str, param: torch.Tensor
    ) -> float:
        """Bytes of one value of a weight, all that goes with it counted in."""
        if self.loading is not None:
            name = self.loading.linear_of(param_name)
            if name is not None and param.numel():
                return self.loading.nbytes_of(name, param) / param.numel()
        return param.element_size()

    def get_quantize_ops(self) -> Any:
        from torchao_masquant.integrations.hf_operations import QuantizeWeight

        assert isinstance(self.loading, QuantizingLoading)
        return QuantizeWeight(self.loading)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Add the step that makes a weight of its parts; the files are checked before."""
        if not isinstance(self.loading, CheckpointLoading):
            return weight_conversions
        from transformers.core_model_loading import WeightConverter

        from torchao_masquant.integrations.hf_operations import AssembleWeight

        self.loading.check_stored(_renaming(weight_conversions, self.loading))
        ours = [
            WeightConverter(
                [rf"\._{name}_{part}" for part in self.loading.part_names],
                [f".{name}"],
                [AssembleWeight(self)],
            )
            for name in self.loading.parameter_names
        ]
        return [*weight_conversions, *ours]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        loading, self.loading = self.loading, None
        if loading is not None:
            loading.finish(model)
        if isinstance(loading, QuantizingLoading):
            self.options = dict.fromkeys(loading.names, loading.recipe.options)
            self.description = loading.recipe.provenance
            # The recipe, which may be as large as the model, is done with.
            self.quantization_config = MASQuantHfConfig.of_checkpoint(
                CheckpointFormat.of(model, self.options)
            )
            model.config.quantization_config = self.quantization_config
        attach_routers(model)
        share_smoothing(model)
        # Saving does not go through it backwards: its pattern would take every weight.
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if not _is_ours(c)]
        return model

    def _dequantize(self, model: Any, dtype: Optional[torch.dtype] = None) -> Any:
        # A config has it as text, where the model was not loaded.
        dequantize_model(
            model, getattr(torch, dtype) if isinstance(dtype, str) else dtype
        )
        for part in model.modules():
            if part is not model and "hf_quantizer" in part.__dict__:
                self.remove_quantization_config(part)
            config: Any = getattr(part, "config", None)
            if getattr(config, "_is_quantized", False):
                config._is_quantized = False
        return model

    # Use

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _renaming(
    conversions: list[Any], loading: CheckpointLoading
) -> Callable[[str], tuple[list[str], bool]]:
    """transformers' way from a name in a file to names in the model."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    known = loading.state_with_parts

    def rename(stored: str) -> tuple[list[str], bool]:
        return model_names(stored, renamings, converters, loading.prefix, known)

    return rename


def _is_ours(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(
        isinstance(getattr(operation, "hf_quantizer", None), MASQuantHfQuantizer)
        for operation in operations
    )
