# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Format versions 1 to 6 of a quantized checkpoint.

Each quantized weight ``X.weight`` is stored as plain tensors ``X._weight_qdata``,
``X._weight_scale``, ..., named as torchao names them; all other tensors are stored as
they are. What the parts mean is in the ``quantization_config`` of ``config.json``::

    {"quant_method": "masquant", "format_version": 1, "dtype": "bfloat16",
     "formats": [{"shape": [N, K], "weight_bits": 4, ...}, ...],
     "options": [{"scheme": "w4a8", "method": "masquant", ...}, ...],
     "layers": {"model.layers.0.mlp.up_proj": {"format": 0, "options": 0}, ...}}

where ``formats`` are :class:`LayerFormat`, and ``options`` say how they were made.

Version 2 has weights of experts, too: the parameter ``X.gate_up_proj`` is stored as
``X._gate_up_proj_qdata``, ..., goes by its own name in ``layers``, and is of the shape
[E, N, K] however the model holds it.

Version 3, which is written, has tensors of one byte under the own names of linears'
weights (:mod:`~torchao_masquant.integrations.guard`), with experts or without. It may have
weights that torchao's own configs have quantized, under ``torchao``: name of a parameter to
what torchao says of its tensor.

Version 4, which is written where a weight is rotated and else as 3, has the block of the
rotation in that weight's format. Without it the integers would be taken for those of other
channels, so that readers of 3 are to refuse it.

Version 5, which is written where activations have a number format and else as 4, has the
names of formats in that weight's format: its tensors may be of float8_e4m3fn and
float8_e8m0fnu.

Version 6, which is written where a tower is quantized and else as 5, has linears that meet one
modality among those that meet all of the model's.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.conversion.quantized_modules import (
    quantized_modules,
    quantized_weights,
)
from torchao_masquant.integrations.guard import guard
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.integrations.torchao_tensors import (
    check_entry,
    is_torchao,
    taken_apart,
)
from torchao_masquant.models.experts import PROJECTIONS
from torchao_masquant.options import SolverOptions
from torchao_masquant.outputs import QUANT_METHOD
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "CheckpointFormat",
    "flatten_state_dict",
    "parameter_of",
    "stored_name",
    "stored_part",
]

#: The version that is written; where a weight is rotated, the one after it is, and where
#: there are floats the one after that; and a last one where towers are quantized.
FORMAT_VERSION = 3
_ROTATED_VERSION = 4
_FLOAT_VERSION = 5
_TOWER_VERSION = 6
_KNOWN_VERSIONS = (
    1,
    2,
    FORMAT_VERSION,
    _ROTATED_VERSION,
    _FLOAT_VERSION,
    _TOWER_VERSION,
)

_OF_EXPERTS = tuple(f".{name}" for name in PROJECTIONS)

_STORED_PART = re.compile(
    rf"(.+)\._({'|'.join(('weight', *PROJECTIONS))})_({'|'.join(PARTS)})"
)


def parameter_of(layer: str, shape: Sequence[int]) -> str:
    """Name of the parameter of what ``layers`` calls so.

    Args:
        layer: name of a linear, or of a parameter of experts.
        shape: of its weight.
    """
    return layer if len(shape) == 3 else f"{layer}.weight"


def stored_name(parameter: str, part: str) -> str:
    """What a part of a quantized parameter is called in a file."""
    module, _, name = parameter.rpartition(".")
    return f"{module}._{name}_{part}" if module else f"_{name}_{part}"


def stored_part(name: str) -> Optional[tuple[str, str]]:
    """The name in ``layers`` and the part that a stored tensor is; None for others."""
    match = _STORED_PART.fullmatch(name)
    if match is None:
        return None
    module, parameter, part = match.groups()
    return module if parameter == "weight" else f"{module}.{parameter}", part


@dataclass
class CheckpointFormat:
    """What a checkpoint says of all its quantized linears.

    Attributes:
        dtype: of the model that was saved, such as "bfloat16".
        layers: name of a linear, or of a parameter of experts, to the format of its
            weight.
        options: name of a linear to the options that it was solved with, where they
            are known.
        torchao: name of a parameter to what torchao says of it, of those that its own
            configs have quantized.
        description: of the calibration, see :class:`~torchao_masquant.Recipe`, and
            "versions" of the libraries; empty where nothing is known.
    """

    dtype: str
    layers: dict[str, LayerFormat]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    torchao: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, options: Optional[Mapping[str, SolverOptions]] = None
    ) -> "CheckpointFormat":
        """The format of a quantized model.

        Args:
            model: a transformers model.
            options: name of a linear, or of a module of experts, to the options that it
                was solved with.
        """
        layers, modules = {}, {}
        for name, module in quantized_modules(model).items():
            for parameter, weight in quantized_weights(module).items():
                layer = name if weight.dim() == 2 else f"{name}.{parameter}"
                layers[layer] = LayerFormat.of(weight)
                modules[layer] = name
        given = options or {}
        solved = {
            name: option
            for name, module in modules.items()
            if (option := given.get(name, given.get(module))) is not None
        }
        return cls.described(model.dtype, layers, solved)  # type: ignore[arg-type]

    @classmethod
    def described(
        cls,
        dtype: torch.dtype,
        layers: dict[str, LayerFormat],
        options: Mapping[str, SolverOptions],
    ) -> "CheckpointFormat":
        """The format of a checkpoint whose weights are elsewhere.

        Args:
            dtype: of the model.
            layers: name of a linear to the format of its weight.
            options: name of a linear to the options that it was solved with.
        """
        known = {
            name: {k: _plain(v) for k, v in option.stored().items()}
            for name, option in options.items()
            if name in layers
        }
        return cls(str(dtype).removeprefix("torch."), layers, known)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """As :meth:`from_json` reads it."""
        formats: list[LayerFormat] = []
        options: list[dict[str, Any]] = []
        layers: dict[str, dict[str, Optional[int]]] = {}
        for name, layer in self.layers.items():
            option = self.options.get(name)
            layers[name] = {
                "format": _index(formats, layer),
                "options": None if option is None else _index(options, option),
            }
        version = FORMAT_VERSION
        if any(layer.hadamard_size is not None for layer in formats):
            version = _ROTATED_VERSION
        if any(layer.act_format is not None for layer in formats):
            version = _FLOAT_VERSION
        if any(layer.is_of_tower for layer in formats):
            version = _TOWER_VERSION
        about = {"description": self.description} if self.description else {}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": version,
            "dtype": self.dtype,
            **about,
            "formats": [entry.to_json() for entry in formats],
            "options": options,
            "layers": layers,
            **({"torchao": self.torchao} if self.torchao else {}),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "CheckpointFormat":
        """Check and read a ``quantization_config``; nothing is allocated.

        Raises:
            ValueError: it is of another format version, or damaged.
        """
        version = entry.get("format_version")
        if version not in _KNOWN_VERSIONS or type(version) is not int:
            newer = type(version) is int and version > _KNOWN_VERSIONS[-1]
            raise ValueError(
                f"the checkpoint is of MASQuant format {version!r}, this version of "
                f"torchao_masquant reads 1 to {_KNOWN_VERSIONS[-1]}: "
                f"{'upgrade it' if newer else 'quantize the model again'}."
            )
        try:
            formats = [LayerFormat.from_json(e) for e in _entries(entry, "formats")]
            options = _entries(entry, "options")
            dtype = entry.get("dtype")
            if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                raise ValueError(f"dtype {dtype!r} is none of torch's")
            layers, known = {}, {}
            for name, numbers in _named(entry, "layers").items():
                if not name.isprintable():
                    raise ValueError(f"{name!r} is no name of a linear")
                layers[name] = _pick(formats, numbers, "format", name)
                if len(layers[name].shape) == 3 and not name.endswith(_OF_EXPERTS):
                    raise ValueError(
                        f"{name} of shape {list(layers[name].shape)} is none of "
                        f"{PROJECTIONS} of experts"
                    )
                if numbers.get("options") is not None:
                    known[name] = dict(_pick(options, numbers, "options", name))
            if not layers:
                raise ValueError("no linear is named")
            others = entry.get("torchao", {})
            if not isinstance(others, dict):
                raise ValueError("torchao is a dict")
            torchao = {name: check_entry(name, text) for name, text in others.items()}
            description = entry.get("description", {})
            if not isinstance(description, dict):
                raise ValueError("the description is a dict")
        except ValueError as error:
            raise ValueError(
                "the quantization_config of the checkpoint's config.json is damaged: "
                f"{str(error).rstrip('.')}; download or save the checkpoint again."
            ) from error
        return cls(str(dtype), layers, known, torchao, dict(description))


def flatten_state_dict(
    state: Mapping[str, Any],
    torchao: Optional[dict[str, str]] = None,
    is_guarded: Callable[[str], bool] = lambda name: False,
) -> dict[str, torch.Tensor]:
    """Plain tensors for the quantized weights of a state_dict, under their stored names.

    Plain tensors stay as they are. Parts are views of the weights; those that share their memory
    (a shift that several linears have in common) are copied, since safetensors refuses
    them.

    Args:
        state: of a quantized model.
        torchao: where given, weights that torchao's own configs have quantized are taken
            apart too, and what torchao says of them is added here by their names.
        is_guarded: whether a linear's weight has a guard under its own name.
    """
    flat: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if torchao is not None and is_torchao(tensor):
            parts, torchao[name] = taken_apart(name, tensor)
            flat |= parts
            continue
        if not isinstance(tensor, MASQuantTensor):
            flat[name] = tensor
            continue
        for part in PARTS:
            value = getattr(tensor, part)
            if value is None:
                continue
            # A slice is written without the rest of the tensor that it is a view of.
            value = value.detach().contiguous()
            storage = value.untyped_storage()
            if (
                storage.data_ptr() in storages
                or storage.nbytes() != value.numel() * value.element_size()
            ):
                value = value.clone()
            storages.add(value.untyped_storage().data_ptr())
            flat[stored_name(name, part)] = value
        if tensor.dim() == 2 and is_guarded(name):
            flat[name] = guard()
    return flat


def _plain(value: Any) -> Any:
    """What JSON gives back equal."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: _plain(v) for k, v in vars(value).items()}
    return list(value) if isinstance(value, (tuple, list)) else value


def _index(known: list[Any], item: Any) -> int:
    if item not in known:
        known.append(item)
    return known.index(item)


def _entries(entry: Mapping[str, Any], name: str) -> list[Any]:
    found = entry.get(name)
    if not isinstance(found, list) or not all(isinstance(e, dict) for e in found):
        raise ValueError(f"{name} is a list of dicts")
    return found


def _named(entry: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    found = entry.get(name)
    if not isinstance(found, dict) or not all(
        isinstance(e, dict) for e in found.values()
    ):
        raise ValueError(f"{name} is a dict of dicts")
    return found


def _pick(known: list[Any], numbers: Mapping[str, Any], key: str, layer: str) -> Any:
    number = numbers.get(key)
    if type(number) is not int or not 0 <= number < len(known):
        raise ValueError(f"{layer} is of {key} {number!r}, of which there is none")
    return known[number]
