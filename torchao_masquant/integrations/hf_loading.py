# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``from_pretrained`` does with a quantized checkpoint."""

import re
from typing import Any, Callable, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.conversion.quantized_modules import (
    quantized_modules,
    replace_weights,
)
from torchao_masquant.integrations.checkpoint_format import (
    CheckpointFormat,
    parameter_of,
    stored_name,
    stored_part,
)
from torchao_masquant.integrations.guard import is_guard
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.integrations.torchao_tensors import assembled, parts_of
from torchao_masquant.models.experts import (
    ExpertWeight,
    by_module,
    experts_of,
    layers_of_model,
)
from torchao_masquant.models.names import named_here
from torchao_masquant.models.output_head import head_name
from torchao_masquant.models.towers import tower_linears
from torchao_masquant.routing import Router
from torchao_masquant.selection import check_whole
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS, TensorKind

__all__ = [
    "CheckpointLoading",
    "attach_routers",
    "finish_modules",
    "set_parameter",
]


def attach_routers(model: nn.Module) -> None:
    """Route the calls of a loaded model, where the modality of a token matters."""
    modules = quantized_modules(model).values()
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
        layers, towers = layers_of_model(model), tower_linears(model)
        routers: dict[tuple[str, ...], Router] = {}
        self._routers: dict[str, Optional[Router]] = {}
        #: name of a head that the checkpoint has, and this class has not
        self._left_out: set[str] = set()
        for name, layer in named_here(model, checkpoint.layers).items():
            if name not in layers and self._is_left_out_head(model, layer):
                self._left_out.add(name)
                continue
            kind = ExpertWeight if len(layer.shape) == 3 else nn.Linear
            if type(layers.get(name)) is not kind:
                raise ValueError(
                    f"the checkpoint has a quantized linear {name}, {self._class} has "
                    "none of that name: load it with the class that it was saved from."
                )
            shape = tuple(layers[name].weight.shape)
            if shape != layer.shape:
                raise ValueError(
                    f"the checkpoint's {name} is of shape {layer.shape}, the "
                    f"model's of shape {shape}: its config.json is of another model."
                )
            self.formats[name] = layer
            if layer.modalities == (towers.get(name),):
                self._routers[name] = None
                continue
            if layer.modalities not in routers:
                routers[layer.modalities] = Router.for_model(model, layer.modalities)
            self._routers[name] = routers[layer.modalities]
        # name of a parameter to that of the linear or experts
        self._named = {parameter_of(n, f.shape): n for n, f in self.formats.items()}
        for saved_name, entry in checkpoint.torchao.items():
            self.torchao[self._parameter_in(self._state, saved_name)] = entry
        try:
            check_whole(list(self.formats), experts_of(model))
        except ValueError as error:
            raise ValueError(
                f"the checkpoint's config.json is damaged: {error}"
            ) from error

    def _is_left_out_head(self, model: Any, layer: LayerFormat) -> bool:
        """Whether it can be the output head, which another class has and this has not."""
        if self._is_saved_class or head_name(model) is not None:
            return False
        return layer.shape == tuple(model.get_input_embeddings().weight.shape)

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
            stored_name(parameter, part): True
            for parameter, name in self._named.items()
            for part in self.formats[name].layout.kinds()
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
        full = [*self._named, *self.torchao]
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
            elif found[0] not in self._left_out:
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
        # A head may rightly be new in another class than the saved one.
        if self._is_saved_class:
            self._check_complete(covered)

    def _check_plain(self, name: str, kind: TensorKind) -> None:
        ours = self._state.get(name)
        if ours is None:
            return
        if name in self._named:
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
        quantized = {*self._named, *self.torchao}
        for name in self._state:
            if name in covered or name in quantized or self._optional(name, covered):
                continue
            raise ValueError(
                f"the checkpoint has no {name}, which {self._class} was saved with: "
                "its files are damaged or not all there; download or save it again."
            )

    def linear_of(self, weight_name: str) -> Optional[str]:
        """The quantized linear whose weight has this name, if it is one."""
        return self._named.get(weight_name)

    def load(
        self, model: nn.Module, name: str, parts: Mapping[str, torch.Tensor]
    ) -> nn.Parameter:
        """Give a linear, or experts, the quantized weight of some loaded parts."""
        layer = self.formats[name]
        weight = layer.build(parts, self.dtype)
        return set_parameter(model, parameter_of(name, layer.shape), weight)

    def load_torchao(
        self, model: nn.Module, name: str, parts: Mapping[str, torch.Tensor]
    ) -> nn.Parameter:
        """Give a parameter of the model the torchao tensor of some loaded parts."""
        stored = {stored_name(name, part): tensor for part, tensor in parts.items()}
        return set_parameter(model, name, assembled(name, stored, self.torchao[name]))

    def finish(self, model: nn.Module) -> None:
        """Give modules whose weights have come the class that computes with them."""
        finish_modules(model, self._routers)


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> nn.Parameter:
    """Give a model a loaded tensor, which transformers is not to initialize again."""
    module, _, parameter_name = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    setattr(model.get_submodule(module), parameter_name, parameter)
    return parameter


def finish_modules(model: nn.Module, routers: Mapping[str, Optional[Router]]) -> None:
    """Give linears and experts that hold quantized weights the class for them.

    Args:
        model: whose weights are loaded.
        routers: by the names of linears and of parameters of experts; None of towers.
    """
    known = layers_of_model(model)
    for layers in by_module({name: known[name] for name in routers}).values():
        weights = {
            name: layer.weight.data
            for name, layer in layers.items()
            if isinstance(layer.weight.data, MASQuantTensor)
        }
        # transformers itself reports weights that the files did not have.
        if weights.keys() == layers.keys():
            replace_weights(layers, weights, routers[next(iter(layers))])


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
