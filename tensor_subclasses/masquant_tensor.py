# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The weight of a modality-aware quantized linear."""

import hashlib
import math
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
from torchao.utils import TorchAOBaseTensor

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.number_formats import number_format
from torchao_masquant.tensor_subclasses.float_weight import (
    dequantize_codes,
    float_scales,
    rounded_codes,
)
from torchao_masquant.tensor_subclasses.fsdp_gathering import FSDPGathering
from torchao_masquant.tensor_subclasses.given_parts import (
    GivenParts,
    check_codes,
    check_integers,
    check_zero_points,
)
from torchao_masquant.tensor_subclasses.low_rank_pair import (
    low_rank_dtype,
    quantize_low_rank_pair,
)
from torchao_masquant.tensor_subclasses.smoothed_weight import (
    check_group_size,
    dequantize_smoothed_weight,
    quantize_smoothed_weight,
)
from torchao_masquant.tensor_subclasses.weight_layout import (
    PARTS,
    WeightLayout,
)

__all__ = ["MASQuantTensor"]


class MASQuantTensor(FSDPGathering, TorchAOBaseTensor):
    """
    Weight quantized once, used by several modalities (MASQuant, arXiv 2603.04800).

    A token ``x`` of modality ``m`` sees, with ``p_m = act_pre_scale[m]`` and
    ``o_m = act_shift[m]``::

        v = Q(H (x * p_m - o_m))
        y = v Q((W / p_0) H)^T + [m > 0] v L1_m L2_m + b_m

    with ``v`` being ``H (x * p_m)`` itself where ``act_bits`` is 16. ``Q`` rounds to
    integers, or to the values of a number format
    (:mod:`torchao_masquant.kernels.number_formats`), whose bits are then called integers
    below. ``H`` rotates blocks
    of ``hadamard_size`` neighbouring channels, and undoes itself
    (:mod:`torchao_masquant.kernels.hadamard`); without a size there is none. Integers,
    scales and down-projections are of rotated channels, smoothing factors and shifts of
    channels as they come.

    M modalities, base first; an (N, K) weight; R is the sum of ``ranks``.

    The weights of E experts of a mixture, (E, N, K), are one such tensor too
    (:meth:`stack`), and ``weight[e]`` is the weight of an expert. All tensor attributes
    then have a leading dimension E, but for ``act_pre_scale``, and for ``act_shift``
    where the experts have the same one. A row of a weight, ``weight[n]``, is one without
    the dimension N, to be looked at (:meth:`dequantize`).

    Tensor Attributes:
        qdata: the integers of ``Q((W / p_0) H)``, signed: (N, K) int8, or
            (N, ceil(K / 2)) uint8, two per byte, where ``weight_bits`` is 4 or 3;
            (N, K) float8_e4m3fn where the ``weight_format`` has such values
        scale: (N, G) float32, or of the type that the ``weight_format`` has, each serving
            K / G neighbours of an output channel; G is 1 for one scale per output channel
        act_pre_scale: reciprocal smoothing factors, (M, K) float32, or (1, K) where
            all modalities share one

    Optional Tensor Attributes:
        l1: (K, R) of 16 bits or int8, down-projections of the modalities 1, 2, ...
            side by side
        l2: (R, N) of l1's type, their up-projections, one below the other
        modality_bias: (M, N) float32, what each modality adds
        act_shift: (M, K) float32, what is taken off the smoothed activations; its
            product with the weight is part of ``modality_bias``
        zero_point: (N, G) int8, the integers that stand for zero; None: symmetric.
            Unsigned integers of b bits are held less 2 ** (b - 1), and so are their
            zero points: uint4 0..15 is -8..7, packed as symmetric ones are
        low_rank_scale: (R,) float32, of the pair where it is int8:
            ``L1 L2 = (l1 * low_rank_scale) l2``
        row_scale: (N,) float32, which ``scale`` is to be multiplied by in a
            ``weight_format`` of two levels

    Non-Tensor Attributes:
        in_features: K
        weight_bits: 8, 4 or 3; 3 bits take the room of 4
        act_bits: 2 to 8, for the dynamic per-token quantization of the activations, or
            16: they are not quantized
        modalities: names of the M modalities, base first
        ranks: rank of the low-rank pair of modality 1, 2, ...
        dtype: of the original weight
        hadamard_size: neighbours that are rotated together, a power of two that divides
            K; None: there is no rotation
        weight_format: name of the weight's number format; None: integers
        act_format: name of that of the activations; None: integers, or 16 bits
    """

    tensor_data_names = [p.name for p in PARTS.values() if not p.optional]
    optional_tensor_data_names = [p.name for p in PARTS.values() if p.optional]
    tensor_attribute_names = [
        "in_features",
        "weight_bits",
        "act_bits",
        "modalities",
        "ranks",
        "dtype",
    ]
    optional_tensor_attribute_names = ["hadamard_size", "weight_format", "act_format"]

    def __new__(
        cls: "type[MASQuantTensor]",
        qdata: torch.Tensor,
        scale: torch.Tensor,
        act_pre_scale: torch.Tensor,
        in_features: int,
        weight_bits: int,
        act_bits: int,
        modalities: Sequence[str],
        ranks: Sequence[int],
        dtype: torch.dtype,
        l1: Optional[torch.Tensor] = None,
        l2: Optional[torch.Tensor] = None,
        modality_bias: Optional[torch.Tensor] = None,
        zero_point: Optional[torch.Tensor] = None,
        low_rank_scale: Optional[torch.Tensor] = None,
        act_shift: Optional[torch.Tensor] = None,
        row_scale: Optional[torch.Tensor] = None,
        hadamard_size: Optional[int] = None,
        weight_format: Optional[str] = None,
        act_format: Optional[str] = None,
    ) -> "MASQuantTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (*qdata.shape[:-1], in_features),
            device=qdata.device,
            dtype=dtype,
            requires_grad=False,
        )

    def __init__(
        self,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        act_pre_scale: torch.Tensor,
        in_features: int,
        weight_bits: int,
        act_bits: int,
        modalities: Sequence[str],
        ranks: Sequence[int],
        dtype: torch.dtype,
        l1: Optional[torch.Tensor] = None,
        l2: Optional[torch.Tensor] = None,
        modality_bias: Optional[torch.Tensor] = None,
        zero_point: Optional[torch.Tensor] = None,
        low_rank_scale: Optional[torch.Tensor] = None,
        act_shift: Optional[torch.Tensor] = None,
        row_scale: Optional[torch.Tensor] = None,
        hadamard_size: Optional[int] = None,
        weight_format: Optional[str] = None,
        act_format: Optional[str] = None,
    ):
        super().__init__()
        if zero_point is not None:
            check_zero_points(act_bits)
        self.qdata = qdata
        self.scale = scale
        self.act_pre_scale = act_pre_scale
        # A compiled function whose arguments have changed once gives them as symbols.
        self.in_features = int(in_features)
        self.weight_bits = int(weight_bits)
        self.act_bits = int(act_bits)
        self.modalities = tuple(modalities)
        self.ranks = tuple(map(int, ranks))
        # dtype is set by __new__
        self.l1 = l1
        self.l2 = l2
        self.modality_bias = modality_bias
        self.zero_point = zero_point
        self.low_rank_scale = low_rank_scale
        self.act_shift = act_shift
        self.row_scale = row_scale
        self.hadamard_size = None if hadamard_size is None else int(hadamard_size)
        self.weight_format = weight_format
        self.act_format = act_format

    @classmethod
    def from_hp(
        cls,
        hp_tensor: torch.Tensor,
        *,
        weight_bits: int = 8,
        act_bits: int = 8,
        group_size: Optional[int] = None,
        symmetric: bool = True,
        modalities: Sequence[str] = ("text",),
        smoothing_factor: Optional[torch.Tensor] = None,
        ranks: Sequence[int] = (),
        l1: Optional[torch.Tensor] = None,
        l2: Optional[torch.Tensor] = None,
        modality_bias: Optional[torch.Tensor] = None,
        act_shift: Optional[torch.Tensor] = None,
        low_rank_bits: int = 16,
        hadamard_size: Optional[int] = None,
        weight_format: Optional[str] = None,
        act_format: Optional[str] = None,
    ) -> "MASQuantTensor":
        """Quantize a high-precision weight, smoothed for the base modality.

        Args:
            hp_tensor: (N, K) floating point weight.
            weight_bits: 8, 4 or 3.
            act_bits: 2 to 8, of the activations that will meet this weight, or 16:
                they are not quantized.
            group_size: divides K, at least 2; None for one scale per output channel.
            symmetric: False for zero points; needs ``act_bits`` of 16.
            modalities: M names, base first.
            smoothing_factor: (M, K), positive, or (1, K) where all modalities share
                one; None for ones (round-to-nearest).
            ranks: rank of the pair of modality 1, 2, ...; their sum is R.
            l1: (K, R) down-projections.
            l2: (R, N) up-projections.
            modality_bias: (M, N).
            act_shift: (M, K), of the smoothed activations; the caller makes up for it
                in ``modality_bias``.
            low_rank_bits: 16: the pair is held in :func:`low_rank_dtype`; 8: it is
                quantized (:func:`quantize_low_rank_pair`).
            hadamard_size: of the rotation that the smoothed weight is rounded in, a
                power of two that divides K; None for none. The pair is of rotated
                channels, too.
            weight_format: name of the weight's number format, which needs an
                ``act_format``; None for integers.
            act_format: name of that of the activations; None for integers.

        Returns:
            The quantized weight, on ``hp_tensor``'s device; the modality bias and
            the shift are held in float32.

        Raises:
            TypeError: ``hp_tensor`` is not floating point.
            ValueError: a shape, a number of bits or a group size does not fit, or a
                pair, bias or shift is given where tokens are not told apart.
        """
        if hp_tensor.dim() != 2:
            raise ValueError(
                "MASQuantTensor.from_hp takes a 2-D weight (N, K), got shape "
                f"{tuple(hp_tensor.shape)}."
            )
        if not hp_tensor.is_floating_point():
            raise TypeError(
                "MASQuantTensor.from_hp takes a floating point weight, got "
                f"{hp_tensor.dtype}."
            )
        n, k = hp_tensor.shape
        if smoothing_factor is None:
            smoothing_factor = torch.ones(1, k, device=hp_tensor.device)
        given = GivenParts(
            weight_bits=weight_bits,
            act_bits=act_bits,
            modalities=modalities,
            smoothing_factor=smoothing_factor,
            ranks=ranks,
            l1=l1,
            l2=l2,
            modality_bias=modality_bias,
            act_shift=act_shift,
            low_rank_bits=low_rank_bits,
            hadamard_size=hadamard_size,
            weight_format=weight_format,
            act_format=act_format,
        )
        given.check((n, k), symmetric=symmetric)
        act_pre_scale = smoothing_factor[0].to(hp_tensor.device, torch.float32)
        if weight_format is not None:
            form = number_format(weight_format)
            group_size = form.group_size or group_size
            check_group_size(group_size, (n, k))
            smoothed = hadamard_rotate(
                hp_tensor.float() / act_pre_scale.reciprocal(), hadamard_size or 1
            )
            scale, row_scale = float_scales(smoothed, form, group_size)
            codes = rounded_codes(smoothed, form, scale, row_scale)
            return cls._assemble(codes, scale, None, hp_tensor.dtype, given, row_scale)
        qdata, scale, zero_point = quantize_smoothed_weight(
            hp_tensor,
            act_pre_scale.reciprocal(),
            weight_bits,
            group_size,
            symmetric=symmetric,
            hadamard_size=hadamard_size,
        )
        return cls._assemble(qdata, scale, zero_point, hp_tensor.dtype, given)

    @classmethod
    def from_integers(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        *,
        zero_point: Optional[torch.Tensor] = None,
        row_scale: Optional[torch.Tensor] = None,
        weight_bits: int,
        act_bits: int,
        modalities: Sequence[str],
        smoothing_factor: torch.Tensor,
        dtype: torch.dtype,
        ranks: Sequence[int] = (),
        l1: Optional[torch.Tensor] = None,
        l2: Optional[torch.Tensor] = None,
        modality_bias: Optional[torch.Tensor] = None,
        act_shift: Optional[torch.Tensor] = None,
        low_rank_bits: int = 16,
        hadamard_size: Optional[int] = None,
        weight_format: Optional[str] = None,
        act_format: Optional[str] = None,
    ) -> "MASQuantTensor":
        """Take integers that are ready, however they were rounded.

        Args:
            qdata: (N, K) int8, unpacked, of ``W / p_0``, or of ``(W / p_0) H`` where
                there is a ``hadamard_size``; signed, see ``zero_point`` of the class.
                Where there is a ``weight_format``, its codes.
            scale: (N, G) floating point, positive and finite, of values that the
                ``weight_format`` has scales of.
            row_scale: (N,) floating point, where the ``weight_format`` has two levels.
            zero_point: (N, G) integers, signed as ``qdata``; None: symmetric.
            dtype: of the original weight.

        All else is as in :meth:`from_hp`.

        Returns:
            The quantized weight, on ``qdata``'s device.

        Raises:
            TypeError: integers or scales are of the wrong type.
            ValueError: a shape or a number of bits does not fit, integers do not fit
                their bits, or a pair, bias or shift is given where tokens are not told
                apart.
        """
        given = GivenParts(
            weight_bits=weight_bits,
            act_bits=act_bits,
            modalities=modalities,
            smoothing_factor=smoothing_factor,
            ranks=ranks,
            l1=l1,
            l2=l2,
            modality_bias=modality_bias,
            act_shift=act_shift,
            low_rank_bits=low_rank_bits,
            hadamard_size=hadamard_size,
            weight_format=weight_format,
            act_format=act_format,
        )
        if qdata.dim() != 2:
            raise ValueError(
                "MASQuantTensor.from_integers takes 2-D integers (N, K), got shape "
                f"{tuple(qdata.shape)}."
            )
        shape = (qdata.shape[0], qdata.shape[1])
        given.check(shape, symmetric=zero_point is None)
        check_integers(qdata, scale, zero_point, weight_bits)
        check_codes(qdata, scale, row_scale, weight_format)
        return cls._assemble(qdata, scale, zero_point, dtype, given, row_scale)

    @classmethod
    def _assemble(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        zero_point: Optional[torch.Tensor],
        dtype: torch.dtype,
        given: GivenParts,
        row_scale: Optional[torch.Tensor] = None,
    ) -> "MASQuantTensor":
        device = qdata.device

        def held(
            t: Optional[torch.Tensor], dtype: torch.dtype
        ) -> Optional[torch.Tensor]:
            return None if t is None else t.to(device, dtype)

        l1, l2, low_rank_scale = given.l1, given.l2, None
        if given.low_rank_bits == 8 and l1 is not None and l2 is not None:
            l1, l2, low_rank_scale = quantize_low_rank_pair(
                l1.to(device), l2.to(device)
            )
        else:
            l1, l2 = held(l1, low_rank_dtype(dtype)), held(l2, low_rank_dtype(dtype))
        layout = given.layout((qdata.shape[0], qdata.shape[1]))
        return cls(
            layout.grid.pack(qdata),
            scale.to(device, torch.float32).to(layout.scale_dtype),
            given.smoothing_factor.to(device, torch.float32).reciprocal(),
            qdata.shape[1],
            given.weight_bits,
            given.act_bits,
            given.modalities,
            given.ranks,
            dtype,
            l1=l1,
            l2=l2,
            modality_bias=held(given.modality_bias, torch.float32),
            zero_point=held(zero_point, torch.int8),
            low_rank_scale=low_rank_scale,
            act_shift=held(given.act_shift, torch.float32),
            row_scale=held(row_scale, torch.float32),
            hadamard_size=given.hadamard_size,
            weight_format=given.weight_format,
            act_format=given.act_format,
        )

    @classmethod
    def stack(cls, weights: "Sequence[MASQuantTensor]") -> "MASQuantTensor":
        """The weights of the experts of a mixture as one tensor.

        Args:
            weights: E tensors of one shape (N, K) and one layout, with the same
                smoothing factors.

        Returns:
            (E, N, K), a copy.

        Raises:
            ValueError: there are none, or they do not fit each other.
        """
        if not weights:
            raise ValueError("MASQuantTensor.stack needs at least one weight.")
        first = weights[0]
        for weight in weights[1:]:
            if weight.__tensor_flatten__() != first.__tensor_flatten__() or not (
                torch.equal(weight.act_pre_scale, first.act_pre_scale)
            ):
                raise ValueError(
                    "experts need weights of one layout, with the same smoothing "
                    f"factors: got {weight!r} beside {first!r}."
                )
        return first.with_parts(
            {
                name: PARTS[name].stacked([getattr(weight, name) for weight in weights])
                for name in first.parts()
            }
        )

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that it consists of, by name."""
        return {name: getattr(self, name) for name in self.__tensor_flatten__()[0]}

    def with_parts(
        self, parts: Mapping[str, torch.Tensor], **attributes: Any
    ) -> "MASQuantTensor":
        """A weight of other parts.

        Args:
            parts: name to tensor.
            attributes: what is no tensor, where it is another than this weight's.
        """
        held = {**parts, **self.__tensor_flatten__()[1], **attributes}
        return type(self)(**held)

    @property
    def weight_layout(self) -> WeightLayout:
        """Which parts it has, and the type and shape of each."""
        return WeightLayout(
            shape=tuple(self.shape),
            weight_bits=self.weight_bits,
            groups=self.scale.shape[-1],
            modalities=len(self.modalities),
            factors=self.act_pre_scale.shape[0],
            rank=sum(self.ranks),
            pair_dtype=torch.bfloat16 if self.l1 is None else self.l1.dtype,
            symmetric=self.symmetric,
            bias=self.modality_bias is not None,
            shift=self.act_shift is not None,
            own_shift=self.act_shift is not None and self.act_shift.dim() == 3,
            weight_format=self.weight_format,
        )

    @property
    def is_routed(self) -> bool:
        """Whether the result depends on the modality of a token."""
        return self.act_pre_scale.shape[0] > 1

    @property
    def weight_only(self) -> bool:
        """Whether activations are not quantized."""
        return self.act_bits == 16

    @property
    def symmetric(self) -> bool:
        """Whether the integer 0 stands for zero everywhere."""
        return self.zero_point is None

    @property
    def numbers(self) -> str:
        """Bits, and formats where there are any: "w4a8", or "nvfp4 by nvfp4"."""
        if self.act_format is None:
            return f"w{self.weight_bits}a{self.act_bits}"
        weight = self.weight_format or f"int{self.weight_bits}"
        return f"{weight} by {self.act_format}"

    @property
    def low_rank_bits(self) -> int:
        """16 or 8, of the low-rank pair; 16 where there is none."""
        return 16 if self.low_rank_scale is None else 8

    @property
    def smoothing_factor(self) -> torch.Tensor:
        """(M, K) float32, or (1, K) where all modalities share one."""
        return self.act_pre_scale.reciprocal()

    @property
    def group_size(self) -> int:
        """Weights that share one scale; K for one scale per output channel."""
        return self.in_features // self.scale.shape[-1]

    @property
    def column_multiple(self) -> int:
        """Input channels of which pieces hold whole multiples: bytes, groups, blocks."""
        layout = self.weight_layout
        group = self.group_size if layout.grouped else 1
        return math.lcm(group, layout.grid.per_byte, self.hadamard_size or 1)

    @property
    def column_units(self) -> str:
        """What :attr:`column_multiple` comes of, for messages."""
        numbers = self.weight_format or f"{self.weight_bits}-bit integers"
        units = f"{numbers}, group size {self.group_size}"
        if self.hadamard_size is None:
            return units
        return f"{units}, rotated in blocks of {self.hadamard_size}"

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all inner tensors, as ``nbytes`` is."""
        # Not nbytes, which torch.compile's tensors of symbolic shape do not have.
        return sum(t.numel() * t.element_size() for t in self.parts().values())

    def refuse_if_flat(self) -> None:
        """Raise for what ``view(-1)`` has made, where values would be looked for in it.

        Raises:
            ValueError: it is such.
        """
        if getattr(self, "is_flat", False):
            raise ValueError(
                "packed integers of several parts can't be flattened to be broadcast in "
                "one buffer, as DistributedDataParallel does at its start: let every "
                "process load the same weights, and give it init_sync=False."
            )

    def as_rows(self) -> "MASQuantTensor":
        """(1, K) of one row (K,), as views."""
        parts = self.parts()
        for name, part in parts.items():
            dim = PARTS[name].dim("N")
            if dim is not None:
                parts[name] = part.unsqueeze(dim)
        return self.with_parts(parts)

    def with_dtype(self, dtype: torch.dtype) -> "MASQuantTensor":
        """The same weight, standing for one of another type; parts are not copied.

        Args:
            dtype: floating point.
        """
        return self.with_parts(self.parts(), dtype=dtype)

    def same_layout(self, other: object) -> bool:
        """Whether something is such a weight, too, that differs in values alone.

        Shapes and types of all parts, and what is no tensor, are compared; devices are
        not.
        """
        if not isinstance(other, MASQuantTensor):
            return False
        return self.__tensor_flatten__() == other.__tensor_flatten__() and all(
            (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            for ours, theirs in zip(self.parts().values(), other.parts().values())
        )

    def smooths_like(self, other: "MASQuantTensor") -> bool:
        """Whether both make the same integers of an input; values are compared.

        Args:
            other: on the same device.
        """
        ours, theirs = self.act_shift, other.act_shift
        return (
            self.act_bits == other.act_bits
            and self.act_format == other.act_format
            and self.hadamard_size == other.hadamard_size
            and torch.equal(self.act_pre_scale, other.act_pre_scale)
            and (
                ours is theirs
                if ours is None or theirs is None
                else torch.equal(ours, theirs)
            )
        )

    def int_data(self) -> torch.Tensor:
        """The integers, or the codes of a format, unpacked: int8, of the weight's shape."""
        return self.weight_layout.grid.unpack(self.qdata, self.in_features)

    def dequantize(
        self,
        output_dtype: Optional[torch.dtype] = None,
        modality: Optional[str] = None,
    ) -> torch.Tensor:
        """The weight that a token of one modality effectively meets.

        Args:
            output_dtype: None for the original weight's.
            modality: one of ``modalities``; None for the base.

        Returns:
            (N, K), for experts (E, N, K), for one row (K,): ``Q((W / p_0) H) H * p_0`` for
            the base, and ``(Q((W / p_0) H) + (L1_m L2_m)^T) H * p_m`` for another
            modality. The modality bias and the shift are no part of it.

        Raises:
            ValueError: the tensor knows no such modality.
        """
        if self.dim() == 1:
            return self.as_rows().dequantize(output_dtype, modality)[0]
        if self.dim() == 3:
            experts = (self[e] for e in range(self.shape[0]))
            return torch.stack([w.dequantize(output_dtype, modality) for w in experts])
        index = 0
        if modality is not None:
            if modality not in self.modalities:
                raise ValueError(
                    f"this MASQuantTensor knows the modalities {self.modalities}, "
                    f"not {modality!r}."
                )
            index = self.modalities.index(modality)
        if self.weight_format is None:
            weight = dequantize_smoothed_weight(
                self.int_data(), self.scale, zero_point=self.zero_point
            )
        else:
            form = number_format(self.weight_format)
            weight = dequantize_codes(self.int_data(), form, self.scale, self.row_scale)
        if index and self.l1 is not None and self.l2 is not None:
            start = sum(self.ranks[: index - 1])
            columns = slice(start, start + self.ranks[index - 1])
            down = self.l1[:, columns].float()
            if self.low_rank_scale is not None:
                down = down * self.low_rank_scale[columns]
            weight = weight + (down @ self.l2[columns].float()).t()
        weight = hadamard_rotate(weight, self.hadamard_size or 1)
        pre_scale = self.act_pre_scale[index if self.is_routed else 0]
        return (weight * pre_scale).to(output_dtype or self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """Key of a compiled graph that takes this tensor: all but its values."""
        attributes = self.__tensor_flatten__()[1]
        described = [
            (name, tuple(t.shape), tuple(t.stride()), t.dtype, t.device)
            for name, t in self.parts().items()
        ]
        key = repr((type(self).__qualname__, described, sorted(attributes.items())))
        return hashlib.sha256(key.encode()).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, args, *rest = super().__reduce_ex__(protocol)
        if self.act_format is not None:
            return (_rebuild_floats, (rebuild, *args), *rest)
        if self.hadamard_size is not None:
            return (_rebuild_rotated, (rebuild, *args), *rest)
        return (rebuild, args, *rest)

    def description(self) -> list[str]:
        """What it is, but for its shape, type and device: a few words for each part."""
        smoothing = (
            f"modalities={self.modalities}"
            if self.is_routed
            else "one smoothing factor for all modalities"
        )
        parts = [self.numbers, smoothing]
        if self.scale.shape[-1] > 1:
            parts.append(f"group_size={self.group_size}")
        if not self.symmetric:
            parts.append("asymmetric")
        if self.hadamard_size is not None:
            parts.append(f"hadamard_size={self.hadamard_size}")
        if self.ranks and sum(self.ranks):
            parts.append(f"ranks={dict(zip(self.modalities[1:], self.ranks))}")
        if self.low_rank_scale is not None:
            parts.append(f"low_rank_bits={self.low_rank_bits}")
        if self.modality_bias is not None:
            parts.append("modality_bias")
        if self.act_shift is not None:
            parts.append("act_shift")
        return [*parts, f"{self.nbytes_stored} bytes"]

    def __repr__(self) -> str:
        parts = [
            f"shape={tuple(self.shape)}",
            *self.description(),
            f"dtype={self.dtype}",
            f"device={self.device}",
        ]
        return f"MASQuantTensor({', '.join(parts)})"


def _rebuild_rotated(rebuild: Callable[..., Any], *args: Any) -> Any:
    """What pickles of rotated weights name.

    Versions that do not know of rotations have no such function and refuse them, where
    they would take the integers for those of other channels.
    """
    return rebuild(*args)


def _rebuild_floats(rebuild: Callable[..., Any], *args: Any) -> Any:
    """What pickles of weights for activations in floats name, likewise."""
    return rebuild(*args)


torch.serialization.add_safe_globals(
    [MASQuantTensor, _rebuild_rotated, _rebuild_floats]
)
