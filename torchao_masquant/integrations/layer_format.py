# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a checkpoint says of one quantized weight, and what its tensors must be."""

from dataclasses import dataclass
from typing import Any, Mapping, Optional

import torch

from torchao_masquant.kernels.number_formats import FORMATS
from torchao_masquant.models.families import TOWER_CONFIGS
from torchao_masquant.recipe import LARGEST_DIMENSION
from torchao_masquant.tensor_subclasses import MASQuantTensor, check_group_size
from torchao_masquant.tensor_subclasses.given_parts import check_rules
from torchao_masquant.tensor_subclasses.weight_layout import (
    PAIR_DTYPES,
    PARTS,
    WeightLayout,
    group_count,
)

__all__ = ["LayerFormat"]

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_SMALL_FLOATS = ("float8_e4m3fn", "float8_e8m0fnu")

# Fields that a format has where they are not None.
_UNSAID = ("hadamard_size", "weight_format", "act_format")


@dataclass(frozen=True)
class LayerFormat:
    """Everything about a :class:`MASQuantTensor` but its values.

    Attributes:
        shape: (N, K) of the original weight, or (E, N, K) of E experts'.
        dtype: its type, such as "bfloat16".
        weight_bits: 8, 4 or 3.
        act_bits: 2 to 8, or 16.
        group_size: weights of an output channel that share a scale; None for all K.
        modalities: names, base first.
        routed: whether each modality has a smoothing factor of its own.
        ranks: of the pairs of modality 1, 2, ..., or empty.
        parts: name of each stored part to its type.
        own_shift: whether each expert has a shift of its own; not said of linears.
        hadamard_size: of the rotation; None, which is not said: there is none.
        weight_format: of the weight; None, which is not said: integers.
        act_format: of the activations; None, which is not said: integers, or 16 bits.
    """

    shape: tuple[int, ...]
    dtype: str
    weight_bits: int
    act_bits: int
    group_size: Optional[int]
    modalities: tuple[str, ...]
    routed: bool
    ranks: tuple[int, ...]
    parts: tuple[tuple[str, str], ...]
    own_shift: bool = False
    hadamard_size: Optional[int] = None
    weight_format: Optional[str] = None
    act_format: Optional[str] = None

    @classmethod
    def of(cls, weight: MASQuantTensor) -> "LayerFormat":
        """The format of a weight."""
        return cls(
            shape=tuple(weight.shape),
            dtype=_type_name(weight.dtype),
            weight_bits=weight.weight_bits,
            act_bits=weight.act_bits,
            group_size=None if weight.scale.shape[-1] == 1 else weight.group_size,
            modalities=tuple(weight.modalities),
            routed=weight.is_routed,
            ranks=tuple(weight.ranks),
            parts=tuple((n, _type_name(t.dtype)) for n, t in weight.parts().items()),
            own_shift=weight.weight_layout.own_shift,
            hadamard_size=weight.hadamard_size,
            weight_format=weight.weight_format,
            act_format=weight.act_format,
        )

    def to_json(self) -> dict[str, Any]:
        """As :meth:`from_json` reads it."""
        entry = {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "weight_bits": self.weight_bits,
            "act_bits": self.act_bits,
            "group_size": self.group_size,
            "modalities": list(self.modalities),
            "routed": self.routed,
            "ranks": list(self.ranks),
            "parts": dict(self.parts),
        }
        if len(self.shape) == 3:
            entry["own_shift"] = self.own_shift
        for name in _UNSAID:
            if getattr(self, name) is not None:
                entry[name] = getattr(self, name)
        return entry

    @classmethod
    def from_json(cls, entry: Any) -> "LayerFormat":
        """Check and read what :meth:`to_json` made; nothing is allocated.

        Raises:
            ValueError: a field is missing, or is of the wrong type or value.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"a format is a dict, got {entry!r}")
        of_experts = isinstance(entry.get("shape"), list) and len(entry["shape"]) == 3
        rotated = "hadamard_size" in entry
        unsaid = [] if of_experts else ["own_shift"]
        unsaid += [name for name in _UNSAID if name not in entry]
        names = [n for n in cls.__dataclass_fields__ if n not in unsaid]
        if sorted(entry) != sorted(names):
            raise ValueError(f"a format has the fields {names}, got {sorted(entry)}")
        shape = _integers(entry, "shape", least=1)
        if len(shape) not in (2, 3):
            raise ValueError(f"shape is (N, K) or (E, N, K), got {list(shape)}")
        if entry["dtype"] not in _FLOATING:
            raise ValueError(f"dtype is one of {_FLOATING}, got {entry['dtype']!r}")
        if not isinstance(entry["routed"], bool):
            raise ValueError(f"routed is true or false, got {entry['routed']!r}")
        own_shift = entry.get("own_shift", False)
        if not isinstance(own_shift, bool):
            raise ValueError(f"own_shift is true or false, got {own_shift!r}")
        modalities = entry["modalities"]
        if not _is_list_of(modalities, str):
            raise ValueError(f"modalities is a list of names, got {modalities!r}")
        group_size = entry["group_size"]
        if group_size is not None:
            group_size = _integer(entry, "group_size", least=2)
        found = cls(
            shape=shape,
            dtype=entry["dtype"],
            weight_bits=_integer(entry, "weight_bits"),
            act_bits=_integer(entry, "act_bits"),
            group_size=group_size,
            modalities=tuple(modalities),
            routed=entry["routed"],
            ranks=_integers(entry, "ranks"),
            parts=_parts(entry["parts"]),
            own_shift=own_shift,
            hadamard_size=_integer(entry, "hadamard_size") if rotated else None,
            weight_format=_format(entry, "weight_format"),
            act_format=_format(entry, "act_format"),
        )
        found._check()
        return found

    def _check(self) -> None:
        """Raise unless the fields fit each other, as the tensor itself would."""
        layout = self.layout
        check_group_size(self.group_size, (self.shape[-2], self.shape[-1]))
        check_rules(
            layout,
            act_bits=self.act_bits,
            modalities=self.modalities,
            ranks=self.ranks,
            hadamard_size=self.hadamard_size,
            act_format=self.act_format,
        )
        if layout.pair_dtype not in PAIR_DTYPES:
            raise ValueError(f"a low-rank pair is not of type {layout.pair_dtype}")
        layout.check_kinds(
            {
                name: (getattr(torch, dtype), layout.shape_of(PARTS[name]))
                for name, dtype in self.parts
            }
        )

    @property
    def is_of_tower(self) -> bool:
        """Whether it is one of a tower's, which meets images alone, or sounds."""
        return len(self.modalities) == 1 and self.modalities[0] in TOWER_CONFIGS

    @property
    def layout(self) -> WeightLayout:
        """Which parts there are, and the type and shape of each."""
        parts = dict(self.parts)
        modalities = len(self.modalities)
        return WeightLayout(
            shape=self.shape,
            weight_bits=self.weight_bits,
            groups=group_count(self.group_size, self.shape[-1]),
            modalities=modalities,
            factors=modalities if self.routed else 1,
            rank=sum(self.ranks),
            pair_dtype=getattr(torch, parts.get("l1", "bfloat16")),
            symmetric="zero_point" not in parts,
            bias="modality_bias" in parts,
            shift="act_shift" in parts,
            own_shift=self.own_shift,
            weight_format=self.weight_format,
        )

    def build(
        self, parts: Mapping[str, torch.Tensor], dtype: Optional[torch.dtype] = None
    ) -> MASQuantTensor:
        """The weight of some loaded parts, which it holds without a copy.

        Args:
            parts: name to tensor.
            dtype: that the weight stands for, in place of the saved one.

        Raises:
            ValueError: the parts are not those of this format.
        """
        self.layout.check_kinds(
            {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()}
        )
        return MASQuantTensor(
            in_features=self.shape[-1],
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            modalities=self.modalities,
            ranks=self.ranks,
            dtype=getattr(torch, self.dtype) if dtype is None else dtype,
            hadamard_size=self.hadamard_size,
            weight_format=self.weight_format,
            act_format=self.act_format,
            **parts,
        )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_list_of(value: Any, kind: type) -> bool:
    # bool is an int to isinstance.
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _integers(entry: Mapping[str, Any], name: str, least: int = 0) -> tuple[int, ...]:
    values = entry[name]
    if not _is_list_of(values, int) or any(
        not least <= v <= LARGEST_DIMENSION for v in values
    ):
        raise ValueError(
            f"{name} holds integers in {least}..{LARGEST_DIMENSION}, got {values!r}"
        )
    return tuple(values)


def _integer(entry: Mapping[str, Any], name: str, least: int = 0) -> int:
    return _integers({name: [entry[name]]}, name, least)[0]


def _format(entry: Mapping[str, Any], name: str) -> Optional[str]:
    found = entry.get(name)
    if name in entry and found not in FORMATS:
        raise ValueError(f"{name} is one of {', '.join(FORMATS)}, got {found!r}")
    return found


def _parts(entry: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(entry, dict):
        raise ValueError(f"parts is a dict of names and types, got {entry!r}")
    for name, dtype in entry.items():
        if name not in PARTS or dtype not in (
            *_FLOATING,
            *_SMALL_FLOATS,
            "int8",
            "uint8",
        ):
            raise ValueError(f"there is no part {name!r} of type {dtype!r}")
    return tuple((name, entry[name]) for name in PARTS if name in entry)
