# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The linears that the GPU benchmark compares, and how far each is from its formula.

Each is a function of an input and the weights of one linear, or of several that read the
input, so that one compiled function takes many copies of the weights in turn.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from gpu_bench.plan import (
    BF16,
    BF16_FUSED,
    FP8_PRODUCT,
    INT8_PRODUCT,
    MIXES,
    PRODUCT,
    Place,
    rank_of,
)
from torch import nn

from torchao_masquant import SCHEMES
from torchao_masquant.kernels import (
    float_reference,
    reference,
    shared_prologue,
    unpack_int4,
)
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["BOUND", "Bench", "Built"]

Inputs = tuple[torch.Tensor, ...]
Weights = tuple[torch.Tensor, ...]
Results = tuple[torch.Tensor, ...]

# Most copies of the weights.
_COPIES = 256
# Tokens whose results are checked.
_CHECKED = 128
# Relative error of a result (Frobenius). A bfloat16 result is within 2**-9 of its
# formula; int8 and int4 of the torchao linears stand for other weights than the dense.
_BOUNDS = {"torchao int4 weight-only": 0.2, "torchao": 0.05}
BOUND = 2.0**-7
_FP8 = torch.float8_e4m3fn


@dataclass
class Built:
    """A candidate that is ready to be measured.

    Attributes:
        calls: the same on different copies of the input and the weights.
        error: relative error of its result, by the Frobenius norm.
        bound: that it must keep.
    """

    calls: list[Callable[[], Results]]
    error: float
    bound: float


class Bench:
    """Builds the candidates of one place.

    Args:
        place: shape and number of tokens.
        device: to build them on.
        cache_bytes: of the device's last cache.
        compile: as ``torch.compile``.
    """

    def __init__(
        self,
        place: Place,
        device: torch.device,
        cache_bytes: int,
        compile: Callable[..., Any] = torch.compile,
    ):
        self.place = place
        self._compile = compile
        self._cache_bytes = cache_bytes
        k, n, m = place.in_features, place.out_features, place.tokens
        generator = torch.Generator(device).manual_seed(k + n + m)
        self._random: dict[str, Any] = {"generator": generator, "device": device}
        self.weight = torch.randn(n, k, **self._random).bfloat16()
        # Some channels are ten times as large, as in a real model.
        self.x = torch.randn(m, k, **self._random).bfloat16()
        self.x[:, :: max(k // 8, 1)] *= 10
        self._smoothing = torch.rand(2, k, **self._random) + 0.5
        self._copies: dict[str, list[Weights]] = {}
        checked = min(m, _CHECKED)
        self._rows = torch.linspace(0, m - 1, checked, device=device).long()

    def build(self, candidate: str) -> Built:
        """Prepare, run once and check a candidate.

        Raises:
            Exception: whatever its library raises where it can't.
        """
        scheme, _, mix = candidate.partition(" ")
        if scheme in SCHEMES:
            return self._ours(scheme, mix)
        if scheme == PRODUCT:
            return self._product(candidate)
        function: Callable[..., Results] = _linears
        if candidate == BF16:
            weights = self._copied(
                candidate, lambda: self.weight.split(self.place.sizes)
            )
        elif candidate == BF16_FUSED:
            weights = self._copied(candidate, lambda: (self.weight,))
        else:
            weights = self._copied(candidate, lambda: (self._torchao(candidate),))
            # Graphs are captured by the benchmark, for all candidates alike.
            function = self._compile(
                _linears, mode="max-autotune-no-cudagraphs", fullgraph=True
            )
        expected = self.x[self._rows].float() @ self.weight.float().t()
        bound = _BOUNDS.get(candidate, _BOUNDS.get(scheme, BOUND))
        return self._built(
            lambda given, some: function(*given, some),
            (self.x,),
            weights,
            expected,
            bound,
        )

    def _ours(self, scheme_name: str, mix: str) -> Built:
        ids = self._ids(MIXES[mix])
        weights = self._copied(
            scheme_name,
            lambda: tuple(
                self._masquant(scheme_name, part)
                for part in self.weight.split(self.place.sizes)
            ),
        )
        # The way that MASQuantLinears go.
        shared_prologue.register()
        function = self._compile(_masquant_linears, fullgraph=True)
        x, ids_of_rows = self.x, None if ids is None else ids[self._rows]
        expected = torch.cat(
            [_formula(x[self._rows], weight, ids_of_rows) for weight in weights[0]], 1
        )
        return self._built(
            lambda given, some: function(*given, some, ids),
            (x,),
            weights,
            expected,
            BOUND,
        )

    def _product(self, candidate: str) -> Built:
        """Of operands that are quantized ahead of it; a plain call, never compiled."""
        scheme = candidate.removeprefix(f"{PRODUCT} ")
        if candidate == FP8_PRODUCT:
            rows = _in_fp8(self.x)
            weights = self._copied(candidate, lambda: _in_fp8(self.weight))
            function: Callable[[Inputs, Weights], Results] = _fp8_product
        else:
            # What torch multiplies is what our weights of 8 bits hold.
            scheme = "w8a8" if candidate == INT8_PRODUCT else scheme
            weight = self._masquant(scheme, self.weight)
            rows = tuple(
                reference.smooth_quantize(self.x, weight.act_pre_scale, None, 8)
            )
            weights = self._copied(candidate, lambda: (weight.qdata, weight.scale))
            bits = weight.weight_bits
            function = (
                _int8_product if candidate == INT8_PRODUCT else _our_product(bits)
            )
        (x, x_scale), (w, w_scale) = rows, weights[0]
        if candidate == INT8_PRODUCT:
            x_scale, w_scale = torch.ones_like(x_scale), torch.ones_like(w_scale)
        if scheme == "w4a8":
            w = unpack_int4(w, x.shape[1])
        expected = (x[self._rows].float() @ w.float().t()) * w_scale.t()
        expected = expected * x_scale[self._rows]
        return self._built(function, rows, weights, expected, BOUND)

    def _built(
        self,
        function: Callable[[Inputs, Weights], Results],
        given: Inputs,
        weights: list[Weights],
        expected: torch.Tensor,
        bound: float,
    ) -> Built:
        found = function(given, weights[0])
        y = torch.cat([part[self._rows] for part in found], 1).float()
        error = float((y - expected).norm() / expected.norm())
        # An input that fits in the cache is not to be found there either.
        count = math.ceil(2 * self._cache_bytes / sum(t.nbytes for t in given))
        count = min(max(1, count), len(weights))
        inputs = [given, *(tuple(t.clone() for t in given) for _ in range(count - 1))]
        calls = [
            lambda some=some, x=inputs[i % count]: function(x, some)
            for i, some in enumerate(weights)
        ]
        return Built(calls, error, bound)

    def _ids(self, share: Optional[float]) -> Optional[torch.Tensor]:
        if share is None:
            return None
        # An image in the middle of a prompt.
        ids = torch.zeros(self.place.tokens, dtype=torch.int64, device=self.x.device)
        count = math.floor(share * self.place.tokens)
        first = (self.place.tokens - count) // 2
        ids[first : first + count] = 1
        return ids

    def _copied(self, name: str, make: Callable[[], Weights]) -> list[Weights]:
        if name not in self._copies:
            weights = make()
            count = math.ceil(2 * self._cache_bytes / sum(map(_stored, weights)))
            count = min(max(2, count), _COPIES)
            copies = [tuple(w.clone() for w in weights) for _ in range(count - 1)]
            self._copies[name] = [weights, *copies]
        return self._copies[name]

    def _masquant(self, scheme_name: str, weight: torch.Tensor) -> MASQuantTensor:
        scheme = SCHEMES[scheme_name]
        n, k = weight.shape
        rank = rank_of(k, n)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, **self._random)

        return MASQuantTensor.from_hp(
            weight,
            weight_bits=scheme.weight_bits,
            act_bits=scheme.act_bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            modalities=("text", "vision"),
            smoothing_factor=self._smoothing,
            ranks=(rank,),
            l1=random(k, rank) / k**0.5,
            l2=random(rank, n),
            modality_bias=random(2, n),
            weight_format=scheme.weight_format,
            act_format=scheme.act_format,
        )

    def _torchao(self, candidate: str) -> torch.Tensor:
        from torchao.quantization import (
            Int4WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        n, k = self.weight.shape
        linear = nn.Linear(k, n, bias=False, device="meta", dtype=torch.bfloat16)
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        model = nn.Sequential(linear)
        int8 = Int8DynamicActivationInt8WeightConfig(version=2)
        if candidate == "torchao int4 weight-only":
            quantize_(
                model,
                Int4WeightOnlyConfig(
                    group_size=128, int4_packing_format="tile_packed_to_4d"
                ),
            )
        elif candidate == "torchao int8 dynamic":
            quantize_(model, int8)
        else:
            from torchao.prototype.smoothquant import SmoothQuantConfig

            quantize_(model, SmoothQuantConfig(int8, step="prepare"))
            model(self.x[self._rows])
            quantize_(model, SmoothQuantConfig(int8, step="convert"))
        return model[0].weight.detach()


def _linears(x: torch.Tensor, weights: Weights) -> Results:
    return tuple(F.linear(x, weight) for weight in weights)


def _masquant_linears(
    x: torch.Tensor, weights: Weights, ids: Optional[torch.Tensor]
) -> Results:
    first, *others = weights
    linear = torch.ops.masquant.linear
    return (
        linear(x, first, ids),
        *(linear(x, weight, ids, smoothed_by=first) for weight in others),
    )


def _in_fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix in float8, and a scale for each row."""
    scale = matrix.float().abs().amax(1, keepdim=True) / torch.finfo(_FP8).max
    return (matrix.float() / scale).to(_FP8), scale


def _fp8_product(x: Inputs, weight: Weights) -> Results:
    (a, a_scale), (b, b_scale) = x, weight
    return (
        torch._scaled_mm(
            a,
            b.t(),
            a_scale,
            b_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    )


def _int8_product(x: Inputs, weight: Weights) -> Results:
    return (torch._int_mm(x[0], weight[0].t()),)


def _our_product(weight_bits: int) -> Callable[[Inputs, Weights], Results]:
    rest = (*(None,) * 5, weight_bits, torch.bfloat16)
    return lambda x, weight: (torch.ops.masquant.int_linear(*x, *weight, *rest),)


def _stored(weight: torch.Tensor) -> int:
    """Bytes of a tensor, or of all tensors inside of it."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(_stored(getattr(weight, n)) for n in weight.__tensor_flatten__()[0])


def _formula(
    x: torch.Tensor, weight: torch.Tensor, ids: Optional[torch.Tensor]
) -> torch.Tensor:
    """(T, N) float32: the operators' plain implementations, on their own device."""
    assert isinstance(weight, MASQuantTensor)
    paired = ids is not None
    if weight.act_format is not None:
        return _formula_of_floats(x, weight, ids)
    if weight.weight_only:
        return reference.weight_only_linear(
            x,
            weight.act_pre_scale,
            weight.qdata,
            weight.scale,
            weight.zero_point,
            weight.l1 if paired else None,
            weight.l2 if paired else None,
            weight.modality_bias,
            ids,
            None,
            weight.ranks,
            weight.weight_bits,
            torch.float32,
        )
    qx, x_scale = reference.smooth_quantize(
        x, weight.act_pre_scale, ids, weight.act_bits
    )
    hidden = None
    if ids is not None:
        assert weight.l1 is not None
        hidden = reference.low_rank_down(qx, x_scale, weight.l1, ids, weight.ranks)
    return reference.int_linear(
        qx,
        x_scale,
        weight.qdata,
        weight.scale,
        hidden,
        weight.l2 if paired else None,
        weight.modality_bias,
        ids,
        None,
        weight.weight_bits,
        torch.float32,
    )


def _formula_of_floats(
    x: torch.Tensor, weight: MASQuantTensor, ids: Optional[torch.Tensor]
) -> torch.Tensor:
    form = weight.act_format
    assert form is not None
    qx, x_scale, token_scale = float_reference.float_smooth_quantize(
        x, weight.act_pre_scale, ids, form
    )
    of_token = token_scale if token_scale.shape[1] else None
    hidden = None
    if ids is not None:
        hidden = float_reference.float_low_rank_down(
            qx, x_scale, of_token, weight.l1, ids, weight.ranks, form
        )
    return float_reference.float_linear(
        qx,
        x_scale,
        of_token,
        weight.qdata,
        weight.scale,
        weight.row_scale,
        hidden,
        None if ids is None else weight.l2,
        weight.modality_bias,
        ids,
        None,
        form,
        weight.weight_format,
        weight.weight_bits,
        torch.float32,
    )
