# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The least time that the operators can take on a GPU, on paper.

A kernel reads each operand and writes each result once, at the bandwidth of memory, and
multiplies at the peak of the tensor cores, whichever takes longer (Williams, Waterman
and Patterson, "Roofline: an insightful visual performance model", 2009). A linear takes
as long as its kernels one after another. Launches, caches and clocks that fall under
load are left out, so that no measurement can be below it, but for operands that are
still in a cache.

**Where the down-projection lives.** ``h = v L1`` of a linear of M tokens, K by N, with a
pair of rank R, could be computed in three places. Numbers are of an H100 at M = 2048,
K = 3584, N = 18944, R = 179 (5 %), every token of one modality beside the base; the
integer product itself takes 140.5 us (:func:`down_projection_places` has them all).

1. *In a kernel of its own*, from the integers: 2 M K R = 2.6 GFLOP of bfloat16, 2.7 us,
   and 10.1 MB, 3.0 us, of which 7.3 MB are the integers just written, most likely still
   in L2. With base tokens among them, tiles of base tokens do nothing.
2. *As R more output rows of the integer product*: 2.6 Gop of int8, 1.3 us, and the
   integers are read no second time. But ``h`` is needed in the epilogue of every other
   tile of the same product: these tiles would wait for it inside one launch, which
   deadlocks where not all programs are resident, or it takes two launches after all,
   and then this is place 1 with an L1 that must be int8, and with no tiles to skip.
3. *In the pass that quantizes*: this saves reading the integers, 2.2 us. But that pass
   is bound by memory, 6.6 us, and needs programs of few rows to fill the GPU: 128
   programs of 16 rows each read all of L1, 164 MB from L2, more than seven times what
   the pass itself moves. Of 32 programs of 64 rows, three of four multiprocessors are
   idle. (Fusing here pays for ranks of 32, where L1 is a fifth the size, and large M.)

Place 1 costs 2.1 % of base-only at most, and is what the kernels do. The up-projection in
the epilogue costs more than all of this: 2 M R N of bfloat16 for each part that ``h`` is
split into, at half the rate of int8, is 14.0 us, 9.5 % of base-only, a part. With one
part the low-rank work of such a call is 11.6 % of base-only, with two 21.1 %. No kernel
on these tensor cores brings a bfloat16 pair of 5 % for every token below a tenth; for
half of the tokens it is 6.1 %. What would is a pair multiplied as int8.
"""

from dataclasses import dataclass
from typing import Optional, Sequence

__all__ = [
    "DEVICES",
    "Device",
    "LinearCall",
    "Work",
    "down_projection_places",
    "int_linear",
    "linear",
    "linears",
    "low_rank_down",
    "microseconds",
    "microseconds_together",
    "smooth",
    "smooth_quantize",
]


@dataclass(frozen=True)
class Device:
    """Published peaks of a GPU, without sparsity.

    Attributes:
        name: of the product.
        architecture: as ``tools/ahead_of_time.py`` names it.
        bandwidth: of memory, bytes a second.
        bf16: bfloat16 operations a second with float32 sums, a multiply-add being two.
        int8: of int8 with int32 sums.
        source: of these numbers.
    """

    name: str
    architecture: str
    bandwidth: float
    bf16: float
    int8: float
    source: str


DEVICES: tuple[Device, ...] = (
    Device(
        "A100",
        "sm_80",
        2.039e12,
        312e12,
        624e12,
        "NVIDIA A100 data sheet, 80 GB SXM",
    ),
    Device(
        "RTX 4090",
        "sm_89",
        1.008e12,
        165.2e12,
        660.6e12,
        "NVIDIA Ada GPU architecture, appendix A",
    ),
    Device("L40S", "sm_89", 0.864e12, 362e12, 733e12, "NVIDIA L40S data sheet"),
    Device(
        "H100",
        "sm_90",
        3.35e12,
        989.4e12,
        1978.9e12,
        "NVIDIA H100 Tensor Core GPU architecture, SXM5",
    ),
    Device(
        "H200",
        "sm_90",
        4.8e12,
        989.4e12,
        1978.9e12,
        "NVIDIA H200 data sheet, SXM",
    ),
    Device(
        "B200",
        "sm_100",
        8.0e12,
        2250e12,
        4500e12,
        "NVIDIA Blackwell architecture technical brief, HGX B200",
    ),
    Device(
        "MI300X",
        "gfx942",
        5.3e12,
        1307.4e12,
        2614.9e12,
        "AMD Instinct MI300X data sheet",
    ),
)


@dataclass(frozen=True)
class Work:
    """What one kernel must do.

    Attributes:
        name: of the operator.
        moved: bytes read and written.
        int8: operations of int8.
        bf16: operations of bfloat16.
    """

    name: str
    moved: float
    int8: float = 0.0
    bf16: float = 0.0

    def seconds(self, device: Device) -> float:
        """The least time."""
        return max(self.moved / device.bandwidth, self._multiplying(device))

    def bound(self, device: Device) -> str:
        """What takes it: "memory", "int8" or "bf16"."""
        if self.moved / device.bandwidth >= self._multiplying(device):
            return "memory"
        int8, bf16 = self.int8 / device.int8, self.bf16 / device.bf16
        return "int8" if int8 >= bf16 else "bf16"

    def _multiplying(self, device: Device) -> float:
        # The same tensor cores do both.
        return self.int8 / device.int8 + self.bf16 / device.bf16


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear.

    Attributes:
        tokens: M.
        in_features: K.
        out_features: N.
        weight_bits: 16 for an unquantized linear, 8 or 4.
        act_bits: 16 or 8.
        group_size: weights that share a scale; None for one a channel.
        share: of the tokens, are of another modality than the base; None: the call is
            base-only and reads no ids.
        rank: of the one pair.
        hidden_parts: bfloat16 numbers that each element of ``h`` is split into.
    """

    tokens: int
    in_features: int
    out_features: int
    weight_bits: int = 16
    act_bits: int = 16
    group_size: Optional[int] = None
    share: Optional[float] = None
    rank: int = 0
    hidden_parts: int = 1

    @property
    def members(self) -> float:
        """Tokens of another modality than the base."""
        return self.tokens * (self.share or 0.0)

    @property
    def _weight_bytes(self) -> float:
        scales = 1
        if self.group_size is not None:
            scales = self.in_features // self.group_size
        if self.weight_bits == 16:
            scales = 0
        integers = self.in_features * self.weight_bits / 8
        # Weights that meet unquantized activations have a zero point, a byte.
        scale = 4 if self.act_bits == 8 else 5
        return self.out_features * (integers + scale * scales)

    @property
    def _ids_bytes(self) -> int:
        return 0 if self.share is None else 8 * self.tokens


def smooth_quantize(call: LinearCall) -> Work:
    """bfloat16 tokens to int8 and their scales; a smoothing vector for each modality."""
    modalities = 1 if call.share is None else 2
    moved = call.tokens * (3 * call.in_features + 4)
    return Work(
        "smooth_quantize", moved + 4 * modalities * call.in_features + call._ids_bytes
    )


def low_rank_down(call: LinearCall) -> Work:
    """int8 tokens of another modality by a bfloat16 L1, to float32."""
    moved = call.members * call.in_features + 2 * call.in_features * call.rank
    return Work(
        "low_rank_down",
        moved + 4 * call.tokens * (call.rank + 1) + call._ids_bytes,
        bf16=2 * call.members * call.in_features * call.rank,
    )


def int_linear(call: LinearCall) -> Work:
    """The integer product, with the up-projection in its epilogue."""
    m, k, n = call.tokens, call.in_features, call.out_features
    moved = m * (k + 4) + call._weight_bytes + 2 * m * n + call._ids_bytes
    if call.members:
        moved += 4 * call.members * call.rank + 2 * call.rank * n
    return Work(
        "int_linear",
        moved,
        int8=2 * m * k * n,
        bf16=2 * call.members * call.rank * n * call.hidden_parts,
    )


def smooth(call: LinearCall) -> Work:
    """bfloat16 tokens to smoothed ones; a smoothing vector for each modality."""
    modalities = 1 if call.share is None else 2
    moved = 4 * call.in_features * (call.tokens + modalities)
    return Work("smooth", moved + call._ids_bytes)


def _smoothed_apart(call: LinearCall) -> bool:
    """Few tokens are smoothed where the product reads them, but for a pair's sake."""
    return call.weight_bits < 16 and bool(call.tokens > 16 or call.members)


def _product_of_16_bits(call: LinearCall) -> Work:
    m, k, n = call.tokens, call.in_features, call.out_features
    moved = 2 * m * (k + n) + call._weight_bytes + call._ids_bytes
    ops = 2.0 * m * k * n
    if call.weight_bits == 16:
        return Work("linear", moved, bf16=ops)
    if not _smoothed_apart(call):
        moved += 4 * k * (1 if call.share is None else 2)
    if call.members:
        moved += 2 * call.rank * (k + n)
        ops += 2 * call.members * call.rank * (k + n)
    return Work("weight_only_linear", moved, bf16=ops)


def linear(call: LinearCall) -> list[Work]:
    """The kernels of a linear, in order."""
    if call.act_bits == 16:
        product = _product_of_16_bits(call)
        return [smooth(call), product] if _smoothed_apart(call) else [product]
    works = [smooth_quantize(call)]
    if call.members:
        works.append(low_rank_down(call))
    return [*works, int_linear(call)]


def microseconds(call: LinearCall, device: Device) -> float:
    """The least time of a whole linear."""
    return 1e6 * sum(work.seconds(device) for work in linear(call))


def linears(calls: Sequence[LinearCall]) -> list[Work]:
    """The kernels of linears of one input, such as q/k/v: it is smoothed once."""
    works = linear(calls[0])
    for call in calls[1:]:
        works += [
            w for w in linear(call) if w.name not in ("smooth_quantize", "smooth")
        ]
    return works


def microseconds_together(calls: Sequence[LinearCall], device: Device) -> float:
    """The least time of linears of one input."""
    return 1e6 * sum(work.seconds(device) for work in linears(calls))


def down_projection_places(
    call: LinearCall, device: Device, rows: int = 16
) -> dict[str, float]:
    """The three places of the down-projection, in numbers: see the module.

    Args:
        call: with all tokens of another modality.
        device: to take the times of.
        rows: tokens of a program of the pass that quantizes.

    Returns:
        Microseconds and megabytes by name.
    """
    base = LinearCall(
        call.tokens,
        call.in_features,
        call.out_features,
        call.weight_bits,
        call.act_bits,
        call.group_size,
    )
    down, quantize = low_rank_down(call), smooth_quantize(call)
    up = 2 * call.members * call.rank * call.out_features
    programs = -(-call.tokens // rows)
    integers = call.members * call.in_features
    return {
        "base-only us": microseconds(base, device),
        "integer product us": 1e6 * int_linear(base).seconds(device),
        "own kernel: multiplying us": 1e6 * down.bf16 / device.bf16,
        "own kernel: memory us": 1e6 * down.moved / device.bandwidth,
        "own kernel: MB": down.moved / 1e6,
        "own kernel: integers MB": integers / 1e6,
        "extra rows: multiplying us": 1e6 * down.bf16 / device.int8,
        "quantize pass: memory us": 1e6 * quantize.moved / device.bandwidth,
        "quantize pass: MB": quantize.moved / 1e6,
        "quantize pass: integers saved us": 1e6 * integers / device.bandwidth,
        "quantize pass: L1 from L2 MB": programs
        * 2
        * call.in_features
        * call.rank
        / 1e6,
        "up-projection, one part us": 1e6 * up / device.bf16,
    }
