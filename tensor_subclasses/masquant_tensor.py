# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The weight of a modality-aware quantized linear."""

import hashlib
import math
from typing import Any, Optional, Sequence

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor, fill_defaults

from torchao_masquant.kernels.int4_packing import pack_int4, unpack_int4
from torchao_masquant.tensor_subclasses.smoothed_weight import (
    dequantize_smoothed_weight,
    quantize_smoothed_weight,
)

__all__ = ["MASQuantTensor", "low_rank_dtype"]

aten = torch.ops.aten


def low_rank_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Type of a low-rank pair: the weight's own where that has 16 bits, else bfloat16.

    A pair repairs a part of the output; 8 bits of mantissa put its rounding 50 dB below
    what it repairs, which float32 weights need no more of than bfloat16 ones.
    """
    return weight_dtype if weight_dtype == torch.float16 else torch.bfloat16


class MASQuantTensor(TorchAOBaseTensor):
    """
    Weight quantized once, used by several modalities (MASQuant, arXiv 2603.04800).

    A token ``x`` of modality ``m`` sees, with ``p_m = act_pre_scale[m]``::

        y = Q(x * p_m) Q(W / p_0)^T + [m > 0] (x * p_m) L1_m L2_m + b_m

    M modalities, base first; an (N, K) weight; R is the sum of ``ranks``.

    Tensor Attributes:
        qdata: the integers of ``Q(W / p_0)``, symmetric: (N, K) int8, or
            (N, ceil(K / 2)) uint8, two per byte, where ``weight_bits`` is 4
        scale: (N, G) float32, each serving K / G neighbours of an output channel;
            G is 1 for one scale per output channel
        act_pre_scale: reciprocal smoothing factors, (M, K) float32, or (1, K) where
            all modalities share one

    Optional Tensor Attributes:
        l1: (K, R) of 16 bits, down-projections of the modalities 1, 2, ... side by
            side
        l2: (R, N) of 16 bits, their up-projections, one below the other
        modality_bias: (M - 1, N) float32, what the modalities 1, 2, ... add

    Non-Tensor Attributes:
        in_features: K
        weight_bits: 8 or 4
        act_bits: 2 to 8, for the dynamic per-token quantization of the activations
        modalities: names of the M modalities, base first
        ranks: rank of the low-rank pair of modality 1, 2, ...
        dtype: of the original weight
    """

    tensor_data_names = ["qdata", "scale", "act_pre_scale"]
    optional_tensor_data_names = ["l1", "l2", "modality_bias"]
    tensor_attribute_names = [
        "in_features",
        "weight_bits",
        "act_bits",
        "modalities",
        "ranks",
        "dtype",
    ]

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
    ) -> "MASQuantTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (qdata.shape[0], in_features),
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
    ):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.act_pre_scale = act_pre_scale
        self.in_features = in_features
        self.weight_bits = weight_bits
        self.act_bits = act_bits
        self.modalities = tuple(modalities)
        self.ranks = tuple(ranks)
        # dtype is set by __new__
        self.l1 = l1
        self.l2 = l2
        self.modality_bias = modality_bias

    @classmethod
    def from_hp(
        cls,
        hp_tensor: torch.Tensor,
        *,
        weight_bits: int = 8,
        act_bits: int = 8,
        group_size: Optional[int] = None,
        modalities: Sequence[str] = ("text",),
        smoothing_factor: Optional[torch.Tensor] = None,
        ranks: Sequence[int] = (),
        l1: Optional[torch.Tensor] = None,
        l2: Optional[torch.Tensor] = None,
        modality_bias: Optional[torch.Tensor] = None,
    ) -> "MASQuantTensor":
        """Quantize a high-precision weight, smoothed for the base modality.

        Args:
            hp_tensor: (N, K) floating point weight.
            weight_bits: 8 or 4.
            act_bits: 2 to 8, of the activations that will meet this weight.
            group_size: divides K, at least 2; None for one scale per output channel.
            modalities: M names, base first.
            smoothing_factor: (M, K), positive, or (1, K) where all modalities share
                one; None for ones (round-to-nearest).
            ranks: rank of the pair of modality 1, 2, ...; their sum is R.
            l1: (K, R) down-projections.
            l2: (R, N) up-projections.
            modality_bias: (M - 1, N).

        Returns:
            The quantized weight, on ``hp_tensor``'s device. The low-rank pair is held
            in :func:`low_rank_dtype`, the modality bias in float32.

        Raises:
            TypeError: ``hp_tensor`` is not floating point.
            ValueError: a shape, a number of bits or a group size does not fit, or a
                pair or bias is given where tokens are not told apart.
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
        if weight_bits not in (4, 8):
            raise ValueError(f"weight_bits must be 4 or 8, got {weight_bits}.")
        if not 2 <= act_bits <= 8:
            raise ValueError(f"act_bits must be in 2..8, got {act_bits}.")
        if group_size is not None and (group_size < 2 or k % group_size):
            raise ValueError(
                "group_size must be at least 2 and divide the input width, got "
                f"group_size={group_size} for a weight of shape {(n, k)}."
            )
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(
                "modalities must be distinct names, base first, got "
                f"{tuple(modalities)}."
            )
        if smoothing_factor is None:
            smoothing_factor = torch.ones(1, k, device=hp_tensor.device)
        others = len(modalities) - 1
        rank = sum(ranks)
        if tuple(smoothing_factor.shape) not in ((1, k), (others + 1, k)):
            raise ValueError(
                f"smoothing_factor must have shape {(others + 1, k)} for modalities "
                f"{tuple(modalities)} and a weight of shape {(n, k)}, or (1, {k}), got "
                f"{tuple(smoothing_factor.shape)}."
            )
        for name, tensor, shape in (
            ("l1", l1, (k, rank)),
            ("l2", l2, (rank, n)),
            ("modality_bias", modality_bias, (others, n)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} for a weight of shape {(n, k)}, "
                    f"modalities {tuple(modalities)} and ranks {tuple(ranks)}, got "
                    f"{tuple(tensor.shape)}."
                )
        if (l1 is None) != (l2 is None) or (l1 is None) != (rank == 0):
            raise ValueError(
                "l1, l2 and ranks go together: give all three, or none of them."
            )
        if rank and (len(ranks) != others or min(ranks) < 0):
            raise ValueError(
                f"ranks must hold one rank for each of {tuple(modalities)[1:]}, got "
                f"{tuple(ranks)}."
            )
        if (
            others
            and smoothing_factor.shape[0] == 1
            and (rank or modality_bias is not None)
        ):
            raise ValueError(
                "a low-rank pair and a modality bias need one smoothing factor for "
                f"each of {tuple(modalities)}: with one for all, tokens are not told "
                "apart."
            )

        act_pre_scale = smoothing_factor.to(
            hp_tensor.device, torch.float32
        ).reciprocal()
        qdata, scale = quantize_smoothed_weight(
            hp_tensor, act_pre_scale[0], weight_bits, group_size
        )
        if weight_bits == 4:
            qdata = pack_int4(qdata)

        def held(
            t: Optional[torch.Tensor], dtype: torch.dtype
        ) -> Optional[torch.Tensor]:
            return None if t is None else t.to(hp_tensor.device, dtype)

        pair_dtype = low_rank_dtype(hp_tensor.dtype)

        return cls(
            qdata,
            scale,
            act_pre_scale,
            k,
            weight_bits,
            act_bits,
            modalities,
            ranks,
            hp_tensor.dtype,
            l1=held(l1, pair_dtype),
            l2=held(l2, pair_dtype),
            modality_bias=held(modality_bias, torch.float32),
        )

    @property
    def is_routed(self) -> bool:
        """Whether the result depends on the modality of a token."""
        return self.act_pre_scale.shape[0] > 1

    @property
    def smoothing_factor(self) -> torch.Tensor:
        """(M, K) float32, or (1, K) where all modalities share one."""
        return self.act_pre_scale.reciprocal()

    @property
    def group_size(self) -> int:
        """Weights that share one scale; K for one scale per output channel."""
        return self.in_features // self.scale.shape[1]

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all inner tensors (``nbytes`` is that of the original weight)."""
        inner = (getattr(self, n) for n in self.__tensor_flatten__()[0])
        # Not nbytes, which torch.compile's tensors of symbolic shape do not have.
        return sum(t.numel() * t.element_size() for t in inner)

    def int_data(self) -> torch.Tensor:
        """The integers, unpacked: (N, K) int8."""
        if self.weight_bits == 4:
            return unpack_int4(self.qdata, self.in_features)
        return self.qdata

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
            (N, K): ``Q(W / p_0) * p_0`` for the base, and
            ``(Q(W / p_0) + (L1_m L2_m)^T) * p_m`` for another modality. The
            modality bias is no part of it.

        Raises:
            ValueError: the tensor knows no such modality.
        """
        index = 0
        if modality is not None:
            if modality not in self.modalities:
                raise ValueError(
                    f"this MASQuantTensor knows the modalities {self.modalities}, "
                    f"not {modality!r}."
                )
            index = self.modalities.index(modality)
        weight = dequantize_smoothed_weight(self.int_data(), self.scale)
        if index and self.l1 is not None and self.l2 is not None:
            start = sum(self.ranks[: index - 1])
            columns = slice(start, start + self.ranks[index - 1])
            weight = (
                weight + (self.l1[:, columns].float() @ self.l2[columns].float()).t()
            )
        pre_scale = self.act_pre_scale[index if self.is_routed else 0]
        return (weight * pre_scale).to(output_dtype or self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """Key of a compiled graph that takes this tensor: all but its values."""
        names, attributes = self.__tensor_flatten__()
        inner = {name: getattr(self, name) for name in names}
        described = [
            (name, tuple(t.shape), tuple(t.stride()), t.dtype, t.device)
            for name, t in inner.items()
        ]
        key = repr((type(self).__qualname__, described, sorted(attributes.items())))
        return hashlib.sha256(key.encode()).hexdigest()

    def __repr__(self) -> str:
        smoothing = (
            f"modalities={self.modalities}"
            if self.is_routed
            else "one smoothing factor for all modalities"
        )
        parts = [
            f"shape={tuple(self.shape)}",
            f"w{self.weight_bits}a{self.act_bits}",
            smoothing,
        ]
        if self.scale.shape[1] > 1:
            parts.append(f"group_size={self.group_size}")
        if self.ranks and sum(self.ranks):
            parts.append(f"ranks={dict(zip(self.modalities[1:], self.ranks))}")
        if self.modality_bias is not None:
            parts.append("modality_bias")
        parts += [
            f"{self.nbytes_stored} bytes",
            f"dtype={self.dtype}",
            f"device={self.device}",
        ]
        return f"MASQuantTensor({', '.join(parts)})"


implements = MASQuantTensor.implements
implements_torch_function = MASQuantTensor.implements_torch_function


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, MASQuantTensor):
        raise TypeError(
            "masquant::linear takes a MASQuantTensor as its weight, and plain tensors "
            f"as everything else; got a {type(weight).__name__} weight."
        )


@implements(torch.ops.masquant.linear.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, modality_ids, bias = fill_defaults(args, 4, [None, None])
    _check_weight(weight)
    if not x.is_floating_point():
        raise TypeError(
            f"masquant::linear takes a floating point input, got {x.dtype}."
        )
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"input width {x.shape[-1]} does not match the weight's "
            f"in_features={weight.in_features} (input shape {tuple(x.shape)}, weight "
            f"shape {tuple(weight.shape)})."
        )
    if modality_ids is not None:
        if modality_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"modality ids of shape {tuple(modality_ids.shape)} do not match the "
                f"tokens of an input of shape {tuple(x.shape)}."
            )
        if modality_ids.is_floating_point() or modality_ids.dtype == torch.bool:
            raise TypeError(f"modality ids are integers, got {modality_ids.dtype}.")
        modality_ids = modality_ids.reshape(-1) if weight.is_routed else None
    tokens = x.reshape(-1, x.shape[-1])
    qx, x_scale = torch.ops.masquant.smooth_quantize(
        tokens, weight.act_pre_scale, modality_ids, weight.act_bits
    )
    hidden = None
    if modality_ids is not None and weight.l1 is not None:
        hidden = torch.ops.masquant.low_rank_down(
            qx, x_scale, weight.l1, modality_ids, weight.ranks
        )
    y = torch.ops.masquant.int_linear(
        qx,
        x_scale,
        weight.qdata,
        weight.scale,
        hidden,
        weight.l2 if hidden is not None else None,
        weight.modality_bias if modality_ids is not None else None,
        modality_ids,
        bias,
        weight.weight_bits,
        x.dtype,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


@implements(aten.linear.default)
@implements_torch_function(torch.nn.functional.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x = kwargs["input"] if "input" in kwargs else args[0]
    weight = kwargs["weight"] if "weight" in kwargs else args[1]
    bias = kwargs["bias"] if "bias" in kwargs else (args[2] if len(args) > 2 else None)
    _check_weight(weight)
    if weight.is_routed:
        raise RuntimeError(
            "torch.nn.functional.linear does not know the modality of a token, and "
            f"this weight treats {weight.modalities} differently: call its "
            "MASQuantLinear, or torch.ops.masquant.linear with modality_ids (None for "
            f"tokens that are all {weight.modalities[0]})."
        )
    return torch.ops.masquant.linear(x, weight, None, bias)


@implements([aten.t.default, aten.transpose.int])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    # No matmul of ours takes a transposed weight: it is for shape arithmetic and
    # inspection, so it gives the values in high precision.
    if args[0].is_routed:
        # aten::linear, where it meets no __torch_function__, is a transpose and a matmul.
        raise RuntimeError(
            "a matmul with a transposed weight does not know the modality of a token, "
            f"and this weight treats {args[0].modalities} differently: call its "
            "MASQuantLinear or torch.ops.masquant.linear, or dequantize(modality=...) "
            "before transposing."
        )
    return func(args[0].dequantize(), *args[1:], **kwargs)


@implements(aten.slice.Tensor)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Rows (output channels) or columns (input channels), step 1, as views.

    The outputs of the column slices of a weight add up to the whole's: the modality
    bias rides with the slice that holds column 0.
    """
    self, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    dim = dim + 2 if dim < 0 else dim
    if step != 1:
        raise ValueError(f"MASQuantTensor slices with step 1 only, got step={step}.")
    size = self.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    end = max(start, end)

    qdata, scale, pre_scale = self.qdata, self.scale, self.act_pre_scale
    l1, l2, modality_bias = self.l1, self.l2, self.modality_bias
    in_features = self.in_features
    if dim == 0:
        qdata = aten.slice.Tensor(qdata, 0, start, end)
        scale = aten.slice.Tensor(scale, 0, start, end)
        if l2 is not None:
            l2 = aten.slice.Tensor(l2, 1, start, end)
        if modality_bias is not None:
            modality_bias = aten.slice.Tensor(modality_bias, 1, start, end)
    else:
        per_byte = 2 if self.weight_bits == 4 else 1
        group_size = self.group_size if scale.shape[1] > 1 else 1
        multiple = math.lcm(group_size, per_byte)
        if start % multiple or (end % multiple and end != size):
            raise ValueError(
                f"columns {start}:{end} of a MASQuantTensor of shape "
                f"{tuple(self.shape)} must start and end on a multiple of {multiple} "
                f"({self.weight_bits}-bit integers, group size {self.group_size})."
            )
        qdata = aten.slice.Tensor(
            qdata, 1, start // per_byte, (end + per_byte - 1) // per_byte
        )
        if scale.shape[1] > 1:
            scale = aten.slice.Tensor(scale, 1, start // group_size, end // group_size)
        pre_scale = aten.slice.Tensor(pre_scale, 1, start, end)
        if l1 is not None:
            l1 = aten.slice.Tensor(l1, 0, start, end)
        if modality_bias is not None and start > 0:
            modality_bias = torch.zeros_like(modality_bias)
        in_features = end - start
    return return_and_correct_aliasing(
        func,
        args,
        kwargs,
        MASQuantTensor(
            qdata,
            scale,
            pre_scale,
            in_features,
            self.weight_bits,
            self.act_bits,
            self.modalities,
            self.ranks,
            self.dtype,
            l1=l1,
            l2=l2,
            modality_bias=modality_bias,
        ),
    )


@implements(aten.copy_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    target, source = args[:2]
    if not all(isinstance(t, MASQuantTensor) for t in (target, source)):
        raise ValueError(
            "copy_ needs two MASQuantTensors of one layout: got a "
            f"{type(source).__name__} for a {type(target).__name__}."
        )
    names, attributes = target.__tensor_flatten__()
    source_names, source_attributes = source.__tensor_flatten__()
    if (
        names != source_names
        or attributes != source_attributes
        or any(getattr(target, n).shape != getattr(source, n).shape for n in names)
    ):
        raise ValueError(
            f"copy_ needs two MASQuantTensors of one layout: got {source!r} for "
            f"{target!r}."
        )
    for name in names:
        getattr(target, name).copy_(getattr(source, name))
    return target


@implements(aten.is_pinned.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    self = args[0]
    return all(getattr(self, n).is_pinned() for n in self.__tensor_flatten__()[0])


@implements(aten._pin_memory.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    return args[0]._apply_fn_to_data(lambda t: t.pin_memory())


torch.serialization.add_safe_globals([MASQuantTensor])
