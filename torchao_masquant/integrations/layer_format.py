# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a checkpoint says of one quantized weight, and what its tensors must be."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Optional

import torch

from torchao_masquant.tensor_subclasses import MASQuantTensor, check_group_size
from torchao_masquant.tensor_subclasses.checks import check_parts

__all__ = ["PARTS", "LayerFormat", "TensorKind"]

#: Parts of a quantized weight, by the names that a checkpoint has for them.
PARTS = (
    *MASQuantTensor.tensor_data_names,
    *MASQuantTensor.optional_tensor_data_names,
)

#: Type and shape of a stored tensor.
TensorKind = tuple[torch.dtype, tuple[int, ...]]

# Of a dimension; larger than any model's, and small enough to be multiplied.
_LARGEST = 2**24

_FLOATING = ("float16", "bfloat16", "float32", "float64")

_TYPES: Mapping[str, tuple[str, ...]] = {
    "qdata": ("int8", "uint8"),
    "scale": ("float32",),
    "act_pre_scale": ("float32",),
    "l1": (*_FLOATING, "int8"),
    "l2": (*_FLOATING, "int8"),
    "modality_bias": ("float32",),
    "zero_point": ("int8",),
    "low_rank_scale": ("float32",),
    "act_shift": ("float32",),
}


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

    @classmethod
    def of(cls, weight: MASQuantTensor) -> "LayerFormat":
        """The format of a weight."""
        parts = {name: getattr(weight, name) for name in PARTS}
        return cls(
            shape=tuple(weight.shape),
            dtype=_type_name(weight.dtype),
            weight_bits=weight.weight_bits,
            act_bits=weight.act_bits,
            group_size=None if weight.scale.shape[-1] == 1 else weight.group_size,
            modalities=tuple(weight.modalities),
            routed=weight.is_routed,
            ranks=tuple(weight.ranks),
            parts=tuple(
                (name, _type_name(t.dtype))
                for name, t in parts.items()
                if t is not None
            ),
            own_shift=weight.act_shift is not None and weight.act_shift.dim() == 3,
            hadamard_size=weight.hadamard_size,
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
        if self.hadamard_size is not None:
            entry["hadamard_size"] = self.hadamard_size
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
        unsaid += [] if rotated else ["hadamard_size"]
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
        )
        found._check()
        return found

    def _check(self) -> None:
        """Raise unless the fields fit each other, as the tensor itself would."""
        # Of one expert: they are all alike.
        shape = (self.shape[-2], self.shape[-1])
        kinds = dataclasses.replace(self, shape=shape, own_shift=False).kinds()
        check_group_size(self.group_size, shape)

        def meta(name: str) -> Optional[torch.Tensor]:
            if name not in kinds:
                return None
            dtype, size = kinds[name]
            return torch.empty(size, dtype=dtype, device="meta")

        smoothing_factor = meta("act_pre_scale")
        if smoothing_factor is None or not {"qdata", "scale"} <= set(kinds):
            raise ValueError("qdata, scale and act_pre_scale are parts of every weight")
        integer_pair = "l1" in kinds and kinds["l1"][0] == torch.int8
        check_parts(
            shape,
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            modalities=self.modalities,
            smoothing_factor=smoothing_factor,
            ranks=self.ranks,
            l1=meta("l1"),
            l2=meta("l2"),
            modality_bias=meta("modality_bias"),
            act_shift=meta("act_shift"),
            low_rank_bits=8 if integer_pair else 16,
            hadamard_size=self.hadamard_size,
        )
        packed = self.weight_bits <= 4
        if kinds["qdata"][0] != (torch.uint8 if packed else torch.int8):
            raise ValueError(
                f"integers of {self.weight_bits} bits are not of type {kinds['qdata'][0]}"
            )
        if integer_pair != ("low_rank_scale" in kinds):
            raise ValueError("low_rank_scale goes with a low-rank pair of 8 bits")
        if "l1" in kinds and kinds["l1"][0] != kinds["l2"][0]:
            raise ValueError("l1 and l2 are of one type")
        if "zero_point" in kinds and self.act_bits != 16:
            raise ValueError("zero points need act_bits of 16")

    def kinds(self) -> dict[str, TensorKind]:
        """Type and shape of each part."""
        *experts, n, k = self.shape
        modalities, rank = len(self.modalities), sum(self.ranks)
        groups = 1 if self.group_size is None else k // self.group_size
        shapes: dict[str, tuple[int, ...]] = {
            "qdata": (n, (k + 1) // 2 if self.weight_bits <= 4 else k),
            "scale": (n, groups),
            "act_pre_scale": (modalities if self.routed else 1, k),
            "l1": (k, rank),
            "l2": (rank, n),
            "modality_bias": (modalities, n),
            "zero_point": (n, groups),
            "low_rank_scale": (rank,),
            "act_shift": (modalities, k),
        }
        shared = {"act_pre_scale"} if self.own_shift else {"act_pre_scale", "act_shift"}
        return {
            name: (
                getattr(torch, t),
                shapes[name] if name in shared else (*experts, *shapes[name]),
            )
            for name, t in self.parts
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        total = 0
        for dtype, shape in self.kinds().values():
            total += torch.Size(shape).numel() * dtype.itemsize
        return total

    def check_tensors(self, found: Mapping[str, TensorKind]) -> None:
        """Raise unless the stored parts are those that this format asks for.

        Args:
            found: name of each part to what a file holds for it.

        Raises:
            ValueError: a part is missing, left over, or of the wrong type or shape.
        """
        expected = self.kinds()
        for name in expected:
            if name not in found:
                raise ValueError(f"its {name} is missing")
        for name, (dtype, shape) in found.items():
            if name not in expected:
                raise ValueError(f"its {name} should not be there")
            if expected[name] != (dtype, tuple(shape)):
                raise ValueError(
                    f"its {name} is {dtype} of shape {tuple(shape)}, it should be "
                    f"{expected[name][0]} of shape {expected[name][1]}"
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
        self.check_tensors({n: (t.dtype, tuple(t.shape)) for n, t in parts.items()})
        return MASQuantTensor(
            in_features=self.shape[-1],
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            modalities=self.modalities,
            ranks=self.ranks,
            dtype=getattr(torch, self.dtype) if dtype is None else dtype,
            hadamard_size=self.hadamard_size,
            **parts,
        )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_list_of(value: Any, kind: type) -> bool:
    # bool is an int to isinstance.
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _integers(entry: Mapping[str, Any], name: str, least: int = 0) -> tuple[int, ...]:
    values = entry[name]
    if not _is_list_of(values, int) or any(not least <= v <= _LARGEST for v in values):
        raise ValueError(
            f"{name} holds integers in {least}..{_LARGEST}, got {values!r}"
        )
    return tuple(values)


def _integer(entry: Mapping[str, Any], name: str, least: int = 0) -> int:
    return _integers({name: [entry[name]]}, name, least)[0]


def _parts(entry: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(entry, dict):
        raise ValueError(f"parts is a dict of names and types, got {entry!r}")
    for name, dtype in entry.items():
        if name not in _TYPES or dtype not in _TYPES[name]:
            raise ValueError(f"there is no part {name!r} of type {dtype!r}")
    return tuple((name, entry[name]) for name in PARTS if name in entry)
