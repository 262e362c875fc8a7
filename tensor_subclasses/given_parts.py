# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a MASQuantTensor is made of, as a caller has it, and whether it fits."""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import check_hadamard_size
from torchao_masquant.kernels.number_formats import (
    FORMATS,
    INTEGERS,
    number_format,
)
from torchao_masquant.tensor_subclasses.weight_layout import (
    PARTS,
    WeightLayout,
)

__all__ = [
    "GivenParts",
    "check_codes",
    "check_integers",
    "check_rules",
    "check_zero_points",
]


@dataclass(frozen=True)
class GivenParts:
    """All that goes with the integers of a weight (N, K).

    Attributes are the arguments of :meth:`MASQuantTensor.from_hp`.
    """

    weight_bits: int
    act_bits: int
    modalities: Sequence[str]
    smoothing_factor: torch.Tensor
    ranks: Sequence[int]
    l1: Optional[torch.Tensor]
    l2: Optional[torch.Tensor]
    modality_bias: Optional[torch.Tensor]
    act_shift: Optional[torch.Tensor]
    low_rank_bits: int
    hadamard_size: Optional[int]
    weight_format: Optional[str] = None
    act_format: Optional[str] = None

    def layout(self, shape: tuple[int, int], *, symmetric: bool = True) -> WeightLayout:
        """Of the weight, but for its groups and the type of its pairs.

        Args:
            shape: (N, K) of it.
            symmetric: whether it has no zero points.
        """
        return WeightLayout(
            shape,
            self.weight_bits,
            modalities=len(self.modalities),
            factors=len(self.smoothing_factor) if self.smoothing_factor.dim() else 0,
            rank=sum(self.ranks),
            symmetric=symmetric,
            bias=self.modality_bias is not None,
            shift=self.act_shift is not None,
            weight_format=self.weight_format,
        )

    def check(self, shape: tuple[int, int], *, symmetric: bool) -> None:
        """Raise unless all of them fit a weight.

        Args:
            shape: (N, K) of it.
            symmetric: whether it has no zero points.

        Raises:
            ValueError: a shape or a number of bits does not fit, a pair, bias or shift
                is given where tokens are not told apart, a shift where activations are
                not quantized, or zero points where they are.
        """
        if self.low_rank_bits not in (8, 16):
            raise ValueError(
                f"low_rank_bits must be 8 or 16, got {self.low_rank_bits}."
            )
        layout = self.layout(shape, symmetric=symmetric)
        check_rules(
            layout,
            act_bits=self.act_bits,
            modalities=self.modalities,
            ranks=self.ranks,
            hadamard_size=self.hadamard_size,
            act_format=self.act_format,
        )
        expected = (len(self.modalities), shape[1])
        found = tuple(self.smoothing_factor.shape)
        if found not in ((1, shape[1]), expected):
            raise ValueError(
                f"smoothing_factor must have shape {expected} for modalities "
                f"{tuple(self.modalities)} and a weight of shape {shape}, or "
                f"(1, {shape[1]}), got {found}."
            )
        for name in ("l1", "l2", "modality_bias", "act_shift"):
            tensor, wanted = getattr(self, name), layout.shape_of(PARTS[name])
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"{name} must have shape {wanted} for a weight of shape {shape}, "
                    f"modalities {tuple(self.modalities)} and ranks "
                    f"{tuple(self.ranks)}, got {tuple(tensor.shape)}."
                )
        if len({self.l1 is None, self.l2 is None, not layout.rank}) > 1:
            raise ValueError(
                "l1, l2 and ranks go together: give all three, or none of them."
            )


def check_rules(
    layout: WeightLayout,
    *,
    act_bits: int,
    modalities: Sequence[str],
    ranks: Sequence[int],
    hadamard_size: Optional[int],
    act_format: Optional[str] = None,
) -> None:
    """Raise unless what a weight has goes together.

    Args:
        layout: its.
        act_bits: see :class:`MASQuantTensor`, as all below.

    Raises:
        ValueError: a number is out of range, there is a part that the weight could have
            no use for, or there are not as many ranks as modalities ask for.
    """
    if hadamard_size is not None:
        check_hadamard_size(hadamard_size, layout.shape[-1])
    if layout.weight_bits not in INTEGERS:
        *others, last = sorted(INTEGERS)
        raise ValueError(
            f"weight_bits must be {', '.join(map(str, others))} or {last}, got "
            f"{layout.weight_bits}."
        )
    if act_bits not in (*range(2, 9), 16):
        raise ValueError(
            "act_bits must be in 2..8, or 16 for activations that are not quantized, "
            f"got {act_bits}."
        )
    check_formats(layout, act_bits, act_format)
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(
            f"modalities must be distinct names, base first, got {tuple(modalities)}."
        )
    if layout.rank and (len(ranks) != len(modalities) - 1 or min(ranks) < 0):
        raise ValueError(
            f"ranks must hold one rank for each of {tuple(modalities)[1:]}, got "
            f"{tuple(ranks)}."
        )
    per_modality = layout.rank or layout.bias or layout.shift
    if len(modalities) > 1 and layout.factors == 1 and per_modality:
        raise ValueError(
            "a low-rank pair, a modality bias and a shift need one smoothing factor for "
            f"each of {tuple(modalities)}: with one for all, tokens are not told "
            "apart."
        )
    if layout.shift and act_bits == 16:
        raise ValueError(
            "a shift is for activations that are quantized: with act_bits=16 it changes "
            "nothing."
        )
    if not layout.symmetric:
        check_zero_points(act_bits)


def check_formats(
    layout: WeightLayout, act_bits: int, act_format: Optional[str]
) -> None:
    """Raise unless number formats fit each other, their bits and a weight's width.

    Args:
        layout: of the weight; one that has no groups yet is asked for none.
        act_bits: of the activations.
        act_format: theirs; None: integers, or 16 bits.

    Raises:
        ValueError: they do not.
    """
    weight_format = layout.weight_format
    if act_format is None:
        if weight_format is not None:
            raise ValueError(
                f"a weight in {weight_format!r} is for activations in a number format, "
                "too: give an act_format."
            )
        return
    k = layout.shape[-1]
    for name, bits in ((weight_format, layout.weight_bits), (act_format, act_bits)):
        if name is None:
            continue
        form = number_format(name)
        if form.grid.bits != bits:
            raise ValueError(f"{name!r} has {form.grid.bits} bits, got {bits}.")
        if k % (form.group_size or 1):
            raise ValueError(
                f"{name!r} has groups of {form.group_size} channels, which do not divide "
                f"the input width of a weight of shape {tuple(layout.shape)}: exclude its "
                "linear."
            )


def check_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_scale: Optional[torch.Tensor],
    weight_format: Optional[str],
) -> None:
    """Raise unless the codes of a format, and their scales, are some that it has.

    Args:
        codes: (N, K) int8.
        scale: (N, G) floating point.
        row_scale: should be (N,) floating point where the format has two levels.
        weight_format: None: integers, which have no ``row_scale``.

    Raises:
        ValueError: they are not.
    """
    form = FORMATS.get(weight_format or "")
    levels = form is not None and form.two_levels
    shape = None if row_scale is None else tuple(row_scale.shape)
    if shape != ((codes.shape[0],) if levels else None):
        wanted = f"have shape ({codes.shape[0]},)" if levels else "be None"
        raise ValueError(
            f"row_scale must {wanted} for a weight in {weight_format or 'integers'}, got "
            f"{shape}."
        )
    if form is None:
        return
    group = codes.shape[1] // scale.shape[1]
    if form.group_size not in (None, group):
        raise ValueError(
            f"{form.name!r} has groups of {form.group_size}, got scales for {group} "
            "neighbours each."
        )
    if codes.is_meta:
        return
    if form.grid.decode(codes).isnan().any():
        raise ValueError(f"qdata holds codes that {form.name!r} has no value for.")
    if not torch.equal(scale.float().to(form.scale_dtype).float(), scale.float()):
        raise ValueError(
            f"scale holds values that scales of {form.name!r} do not have."
        )
    if row_scale is not None and not (row_scale.isfinite() & (row_scale > 0)).all():
        raise ValueError("row_scale must be positive and finite.")


def check_zero_points(act_bits: int) -> None:
    """Raise where a weight can't have zero points.

    Raises:
        ValueError: activations are quantized.
    """
    if act_bits != 16:
        raise ValueError(
            "asymmetric weights are for activations that are not quantized "
            f"(act_bits=16), got act_bits={act_bits}: quantize the weight "
            "symmetrically."
        )


def check_integers(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    weight_bits: int,
) -> None:
    """Raise unless ready integers, their scales and zero points are of one kind.

    Values are looked at where there are any, that is not on the meta device.

    Args:
        qdata: (N, K), should be int8.
        scale: should be (N, G) floating point, positive and finite.
        zero_point: should be (N, G) of an integer type, or None.
        weight_bits: 3, 4 or 8, which all integers must fit.

    Raises:
        TypeError: something is of the wrong type.
        ValueError: a shape or a value does not fit.
    """
    if qdata.dtype != torch.int8:
        raise TypeError(
            "MASQuantTensor.from_integers takes unpacked integers of type int8, got "
            f"{qdata.dtype}."
        )
    n, k = qdata.shape
    groups = scale.shape[1] if scale.dim() == 2 else 0
    if scale.dim() != 2 or scale.shape[0] != n or groups < 1 or k % groups:
        raise ValueError(
            f"scale must have shape ({n}, G), with a number of groups G that divides "
            f"{k}, for integers of shape {(n, k)}, got {tuple(scale.shape)}."
        )
    if k // groups < 2:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} leaves one integer to a group for "
            f"integers of shape {(n, k)}: groups hold at least 2."
        )
    if not scale.is_floating_point():
        raise TypeError(f"scale must be floating point, got {scale.dtype}.")
    if not scale.is_meta and not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError("scale must be positive and finite.")
    if zero_point is not None:
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"zero_point must have scale's shape {tuple(scale.shape)}, got "
                f"{tuple(zero_point.shape)}."
            )
        if zero_point.is_floating_point() or zero_point.dtype == torch.bool:
            raise TypeError(f"zero_point must be integers, got {zero_point.dtype}.")
    least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    for name, values in (("qdata", qdata), ("zero_point", zero_point)):
        if values is None or values.is_meta or not values.numel():
            continue
        found = int(values.min()), int(values.max())
        if found[0] < least or found[1] > most:
            raise ValueError(
                f"{name} of {weight_bits} bits must lie in {least}..{most}, got "
                f"{found[0]}..{found[1]}."
            )
