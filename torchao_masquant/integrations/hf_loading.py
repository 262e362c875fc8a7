# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What one ``from_pretrained`` does with the linears of a model on the meta device."""

import re
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch
from torch import nn

from torchao_masquant.calibration.request import base_first
from torchao_masquant.config import MASQuantConfig
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.experts import ExpertWeight, experts_of
from torchao_masquant.freed_memory import return_freed_memory
from torchao_masquant.integrations.checkpoint_format import (
    CheckpointFormat,
    parameter_of,
    quantized_modules,
    stored_name,
    stored_part,
)
from torchao_masquant.integrations.guard import is_guard
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.integrations.torchao_tensors import assembled, parts_of
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.names import named_here
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.routing import Router
from torchao_masquant.selection import check_whole, match_names, select
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS, TensorKind

__all__ = ["CheckpointLoading", "QuantizingLoading", "attach_routers"]


def attach_routers(model: nn.Module) -> None:
    """Route the calls of a loaded model, where the modality of a token matters."""
    modules = quantized_modules(model)
    for router in dict.fromkeys(m.router for m in modules if m.router is not None):
        # An incomplete router refuses tokens of a modality that it does not know.
        if not router.is_complete or any(
            m.routed for m in modules if m.router is router
        ):
            router.detach(model)
            router.attach(model)


class CheckpointLoading:
    """Loads quantized weights, after all that can be checked beforehand is checked.

    Args:
        model: on the meta device, not quantized.
        checkpoint: what its ``config.json`` says.
        stored: name to type and shape of each tensor in its files, None where there
            are no files to look at.
        dtype: that was asked for in ``from_pretrained``.

    Raises:
        ValueError: the checkpoint is of another model.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: CheckpointFormat,
        stored: Optional[Mapping[str, TensorKind]],
        dtype: Optional[torch.dtype],
    ):
        self.formats: dict[str, LayerFormat] = {}
        #: name of a parameter to what torchao says of it
        self.torchao: dict[str, str] = {}
        self.stored = stored
        # Another type than the saved one is meant for the linears, too.
        self.dtype = None if dtype == checkpoint.torch_dtype else dtype
        self._state: dict[str, torch.Tensor] = dict(model.state_dict())
        self.prefix: str = model.base_model_prefix
        self._class = type(model).__name__
        self._is_saved_class = self._class in (model.config.architectures or ())
        self._optional = _optional_names(model)
        modules: dict[str, Any] = dict(model.named_modules())
        modules |= experts_of(model)
        routers: dict[tuple[str, ...], Router] = {}
        self._routers: dict[str, Router] = {}
        for name, layer in named_here(model, checkpoint.layers).items():
            kind = ExpertWeight if len(layer.shape) == 3 else nn.Linear
            if type(modules.get(name)) is not kind:
                raise ValueError(
                    f"the checkpoint has a quantized linear {name}, {self._class} has "
                    "none of that name: load it with the class that it was saved from."
                )
            shape = tuple(modules[name].weight.shape)
            if shape != layer.shape:
                raise ValueError(
                    f"the checkpoint's {name} is of shape {layer.shape}, the "
                    f"model's of shape {shape}: its config.json is of another model."
                )
            if layer.modalities not in routers:
                routers[layer.modalities] = Router.for_model(model, layer.modalities)
            self.formats[name] = layer
            self._routers[name] = routers[layer.modalities]
        for saved_name, entry in checkpoint.torchao.items():
            self.torchao[self._parameter_in(self._state, saved_name)] = entry
        try:
            check_whole(list(self.formats), experts_of(model))
        except ValueError as error:
            raise ValueError(
                f"the checkpoint's config.json is damaged: {error}"
            ) from error

    def _parameter_in(self, state: Mapping[str, Any], saved_name: str) -> str:
        """The same for a parameter that is torchao's."""
        for name in self._possible_names(saved_name):
            if name in state:
                return name
        raise ValueError(
            f"the checkpoint has a quantized weight {saved_name}, {self._class} has "
            "none of that name: load it with the class that it was saved from."
        )

    def _possible_names(self, saved_name: str) -> tuple[str, ...]:
        prefix = f"{self.prefix}."
        return saved_name, saved_name.removeprefix(prefix), prefix + saved_name

    @property
    def state_with_parts(self) -> dict[str, Any]:
        """Names that tensors of the checkpoint may have here."""
        parts = {
            stored_name(parameter_of(name, layer.shape), part): True
            for name, layer in self.formats.items()
            for part in layer.layout.kinds()
        }
        return self._state | parts | dict.fromkeys(self._torchao_parts, True)

    @property
    def _torchao_parts(self) -> list[str]:
        """Stored names of the parts of torchao's weights."""
        return [
            stored_name(name, part)
            for name, entry in self.torchao.items()
            for part in parts_of(entry)
        ]

    @property
    def part_names(self) -> list[str]:
        """Of all parts; one that another begins with comes after it."""
        others = {part for e in self.torchao.values() for part in parts_of(e)}
        return sorted({*PARTS, *others}, key=lambda name: (-len(name), name))

    @property
    def parameter_names(self) -> list[str]:
        """What quantized parameters are called in their modules."""
        full = [parameter_of(n, f.shape) for n, f in self.formats.items()]
        full += self.torchao
        return list(dict.fromkeys(name.rpartition(".")[2] for name in full))

    def nbytes_of(self, name: str, weight: torch.Tensor) -> int:
        """Bytes of a linear's quantized weight."""
        return self.formats[name].layout.nbytes

    def check_stored(self, rename: Callable[[str], tuple[list[str], bool]]) -> None:
        """Compare the files with the model, before anything is allocated.

        Args:
            rename: from a name in the files to those of the model that it becomes, and
                whether it becomes one of them as it is.

        Raises:
            ValueError: a tensor is missing, left over, or of the wrong type or shape.
        """
        if self.stored is None:
            return
        parts: dict[str, dict[str, TensorKind]] = {name: {} for name in self.formats}
        covered: set[str] = set()
        missing = set(self._torchao_parts)
        for in_file, kind in self.stored.items():
            names, as_it_is = rename(in_file)
            if names[0] in missing:
                missing.remove(names[0])
                continue
            found = stored_part(names[0])
            if found is None:
                covered.update(names)
                if as_it_is:
                    self._check_plain(names[0], kind)
            elif found[0] in parts:
                parts[found[0]][found[1]] = kind
            else:
                raise ValueError(
                    f"the checkpoint has a part of a quantized weight, {in_file}, "
                    "that its config.json does not know: download or save it again."
                )
        for name, layer in self.formats.items():
            try:
                layer.layout.check_kinds(parts[name])
            except ValueError as error:
                raise ValueError(
                    f"the checkpoint's {name} does not fit its config.json: {error}; "
                    "download or save it again."
                ) from error
        if missing:
            raise ValueError(
                f"the checkpoint has no {min(missing)}, which its config.json names: "
                "download or save it again."
            )
        # Of another class, a head may rightly be new.
        if self._is_saved_class:
            self._check_complete(covered)

    def _check_plain(self, name: str, kind: TensorKind) -> None:
        ours = self._state.get(name)
        if ours is None:
            return
        if name.removesuffix(".weight") in self.formats:
            if is_guard(kind):
                return
            raise ValueError(
                f"the checkpoint has {name} in full precision, its config.json says "
                "that it is quantized: download or save it again."
            )
        other_shape = self._is_saved_class and tuple(ours.shape) != kind[1]
        if other_shape or ours.is_floating_point() != kind[0].is_floating_point:
            raise ValueError(
                f"the checkpoint's {name} is {kind[0]} of shape {kind[1]}, the model's "
                f"{ours.dtype} of shape {tuple(ours.shape)}: the file is damaged, or "
                "of another model."
            )

    def _check_complete(self, covered: set[str]) -> None:
        quantized = {parameter_of(n, f.shape) for n, f in self.formats.items()}
        quantized |= set(self.torchao)
        for name in self._state:
            if name in covered or name in quantized or self._optional(name, covered):
                continue
            raise ValueError(
                f"the checkpoint has no {name}, which {self._class} was saved with: "
                "its files are damaged or not all there; download or save it again."
            )

    def linear_of(self, weight_name: str) -> Optional[str]:
        """The quantized linear whose weight has this name, if it is one."""
        return _layer_of(weight_name, self.formats)

    def load(
        self, model: nn.Module, name: str, parts: Mapping[str, torch.Tensor]
    ) -> nn.Parameter:
        """Turn a linear into a quantized one, with the weight of some loaded parts.

        Of experts, this replaces the parameter alone: see :meth:`finish_experts`.
        """
        weight = self.formats[name].build(parts, self.dtype)
        return _replace(model, name, weight, self._routers[name])

    def load_torchao(
        self, model: nn.Module, name: str, parts: Mapping[str, torch.Tensor]
    ) -> nn.Parameter:
        """Give a parameter of the model the torchao tensor of some loaded parts."""
        stored = {stored_name(name, part): tensor for part, tensor in parts.items()}
        weight = assembled(name, stored, self.torchao[name])
        module, _, parameter_name = name.rpartition(".")
        parameter = nn.Parameter(weight, requires_grad=False)
        # So that transformers does not initialize it again.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(model.get_submodule(module), parameter_name, parameter)
        return parameter

    def finish_experts(self, model: nn.Module) -> None:
        """Turn experts into quantized ones, once all of their weights are there."""
        _finish_experts(model, self._routers)


class QuantizingLoading:
    """Quantizes each weight as it is loaded.

    Args:
        model: on the meta device, not quantized.
        config: with a recipe, or one that needs none.
        left_out: names of modules as transformers' ``modules_to_not_convert`` has them.

    Raises:
        ValueError: the recipe was made for another model, or nothing is left.
    """

    def __init__(
        self, model: Any, config: MASQuantConfig, left_out: Sequence[str] = ()
    ):
        self.config = config
        self.done: set[str] = set()
        #: the first weight that could not be quantized
        self.error: Optional[ValueError] = None
        self._class = type(model).__name__
        self._experts = experts_of(model)
        self._layers: dict[str, Optional[LayerRecipe]]
        recipe = config.loaded_recipe
        if recipe is not None:
            saved = named_here(model, recipe.layers)
            names = match_names(list(saved), config.include, config.exclude)
            self._layers = {name: saved[name] for name in names}
            modalities = recipe.modalities
            self._check_names(dict(model.named_modules()))
            check_whole(names, self._experts)
        else:
            modalities = base_first(model, config.base_modality, config.modalities)
            selected = select(
                model, config.include, config.exclude, config.options, len(modalities)
            )
            self._layers = dict.fromkeys([*selected.linears, *selected.experts])
        if left_out:
            self._leave_out(left_out)
        self.router = Router.for_model(model, modalities)

    def _leave_out(self, names: Sequence[str]) -> None:
        from transformers.quantizers.quantizers_utils import should_convert_module

        self._layers = {
            name: layer
            for name, layer in self._layers.items()
            if should_convert_module(name, list(names))
        }
        if not self._layers:
            raise ValueError(
                f"modules_to_not_convert ({list(names)}) leaves no linear to quantize."
            )
        check_whole(list(self._layers), self._experts)

    def _check_names(self, modules: Mapping[str, nn.Module]) -> None:
        again = "use the model that it was made for, or calibrate again"
        for name, layer in self._layers.items():
            of_experts = layer is not None and len(layer.shape) == 3
            module: Union[nn.Module, ExpertWeight, None] = (
                self._experts.get(name) if of_experts else modules.get(name)
            )
            if not isinstance(module, (nn.Linear, ExpertWeight)):
                raise ValueError(
                    f"the recipe was made for another model: {self._class} has no "
                    f"linear {name}; {again}."
                )
            if layer is not None and tuple(module.weight.shape) != tuple(layer.shape):
                raise ValueError(
                    f"{name}: the recipe was made for a weight of shape "
                    f"{tuple(layer.shape)}, the model's is "
                    f"{tuple(module.weight.shape)}; {again}."
                )

    @property
    def names(self) -> Sequence[str]:
        """Linears that are to be quantized."""
        return list(self._layers)

    def linear_of(self, weight_name: str) -> Optional[str]:
        """The linear to quantize whose weight has this name, if it is one."""
        return _layer_of(weight_name, self._layers, self._experts)

    def nbytes_of(self, name: str, weight: torch.Tensor) -> float:
        """Bytes of a linear's weight once it is quantized."""
        layer = self._layers[name]
        packed = self.config.options.number_format.weight_bits <= 4
        integers = weight.numel() * (0.5 if packed else 1)
        if layer is None:
            return integers
        others = {k: t for k, t in layer.tensors().items() if k != "qdata"}
        return integers + sum(t.nbytes for t in others.values())

    def load(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Quantize a weight that has arrived, in the linear that it is for.

        A weight that the recipe was not made for is remembered in :attr:`error`, and
        neither it nor those after it are kept: transformers would bury an exception
        from here in its report.
        """
        self.done.add(name)
        if self.error is None:
            try:
                _replace(model, name, self._quantized(name, weight), self.router)
                return_freed_memory()
                return
            except ValueError as error:
                self.error = error
        # Of the right shape, and of no size.
        nothing = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        parameter = nn.Parameter(nothing, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if name in self._experts:
            experts = self._experts[name]
            setattr(experts.module, experts.parameter, parameter)
        else:
            model.get_submodule(name).weight = parameter

    def _quantized(self, name: str, weight: torch.Tensor) -> MASQuantTensor:
        options = self.config.options
        layer = self._layers[name]
        if name in self._experts and self._experts[name].module.is_transposed:
            weight = weight.transpose(1, 2)
        if layer is None:
            layer = LayerRecipe.rounded(weight.shape)
        elif (found := weight_fingerprint(weight)) != layer.fingerprint:
            raise ValueError(
                f"{name}: the recipe was made for a weight with fingerprint "
                f"{layer.fingerprint}, the checkpoint's is {found}; use the model that "
                "it was made for, in the same dtype, or calibrate again."
            )
        try:
            return layer.quantize(
                weight,
                options.number_format,
                self.router.modalities,
                options.low_rank_bits,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def finish_experts(self, model: nn.Module) -> None:
        """Turn experts into quantized ones, once all of their weights are there."""
        _finish_experts(model, dict.fromkeys(self._layers, self.router))

    def finish(self) -> None:
        """Raise unless every weight has been quantized.

        Raises:
            ValueError: one could not be, or was not in the checkpoint.
        """
        if self.error is not None:
            raise self.error
        missing = [name for name in self._layers if name not in self.done]
        if missing:
            raise ValueError(
                f"{missing[0]} was not quantized, since the checkpoint has no weight "
                "for it of its own: load the model without quantization_config, and "
                "call quantize_."
            )


def _layer_of(
    weight_name: str,
    layers: Mapping[str, Any],
    experts: Optional[Mapping[str, ExpertWeight]] = None,
) -> Optional[str]:
    """Name in ``layers`` of what has a weight of this name, if it is there.

    Args:
        experts: whose parameters go by their own names; None: any in ``layers`` may.
    """
    name = weight_name.removesuffix(".weight")
    if name not in layers:
        return None
    own = experts is None or name in experts
    return name if own or name != weight_name else None


def _replace(
    model: nn.Module, name: str, weight: MASQuantTensor, router: Router
) -> nn.Parameter:
    if weight.dim() == 3:
        prefix, _, parameter_name = name.rpartition(".")
        parameter = nn.Parameter(weight, requires_grad=False)
        setattr(model.get_submodule(prefix), parameter_name, parameter)
    else:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parameter = MASQuantLinear.from_float(linear, weight, name, router).weight
    # So that transformers does not initialize it again.
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def _finish_experts(model: nn.Module, routers: Mapping[str, Router]) -> None:
    """Turn the experts whose parameters are quantized into quantized experts.

    Args:
        routers: name of a parameter to its router, of those that should be.
    """
    modules: dict[nn.Module, dict[str, ExpertWeight]] = {}
    for name, weight in experts_of(model).items():
        if name in routers:
            modules.setdefault(weight.module, {})[name] = weight
    for module, weights in modules.items():
        loaded = {
            w.parameter: getattr(module, w.parameter).data for w in weights.values()
        }
        # Of one that was not there transformers has its own to say.
        if all(isinstance(tensor, MASQuantTensor) for tensor in loaded.values()):
            name, first = next(iter(weights.items()))
            fqn = name.removesuffix(f".{first.parameter}")
            MASQuantExperts.from_float(module, loaded, fqn, routers[name])


def _optional_names(model: Any) -> Callable[[str, set[str]], bool]:
    """Whether a name need not be in the files of a model, given those that are."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    patterns = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())

    def is_optional(name: str, covered: set[str]) -> bool:
        partners = {tied.get(name)} | {k for k, v in tied.items() if v == name}
        return (
            name in unsaved
            or bool(partners & covered)
            or any(re.search(pattern, name) for pattern in patterns)
        )

    return is_optional
