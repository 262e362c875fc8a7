# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What implements the operators, how each is called, and how exact it is.

A backend runs an operator in every way it has: with either method of multiplying and one
thread or two, in tilings of one pass and of several. Without a GPU the Triton kernels
run in Triton's interpreter, on shapes that it can bear.
"""

import importlib.util
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from operator_cases import (
    DOWN,
    INT8,
    ORACLES,
    PRODUCT,
    QUANTIZE,
    WEIGHT_ONLY,
    Operands,
)
from operator_oracle import (
    UNIT,
    Result,
    assert_quantized,
    assert_within,
    f64,
    lost_in_16_bits,
)

from torchao_masquant.kernels import cpu_lowering, reference
from torchao_masquant.kernels.cpu_engine import CpuEngine
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.operators import operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Backend:
    """The reference, and what the others have in common with it."""

    name = "reference"
    #: ids that name no modality: the reference raises, a kernel of a GPU shows nan
    raises = True

    def why_not(self) -> str:
        return ""

    def ways(self, operator: str) -> Iterator[str]:
        """Sets the next way to run an operator, and names it."""
        yield self.name

    def run(self, operator: str, *args: Any) -> Any:
        return getattr(reference, operator)(*args)

    def tolerance(
        self, operator: str, args: tuple[Any, ...], expected: Result
    ) -> np.ndarray:
        return expected.tolerance

    def is_exact(self, operator: str, args: tuple[Any, ...]) -> bool:
        """Whether results are those of the reference, bit by bit."""
        return operator == QUANTIZE

    def __str__(self) -> str:
        return self.name


class Cpu(Backend):
    """The operators as they are called, by the C++ kernels."""

    name = "cpu"

    def why_not(self) -> str:
        if cpu_lowering.prepare().engine is CpuEngine.REFERENCE:
            return f"no C++ kernels: {cpu_lowering.engine().reason}"
        return ""

    def ways(self, operator: str) -> Iterator[str]:
        threads = torch.get_num_threads()
        amx = cpu_lowering.engine().engine is CpuEngine.AMX
        try:
            for tiles in {False, amx}:
                torch.ops.masquant_cpu.use_tiles(tiles)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    yield f"{'AMX' if tiles else 'vectors'}, {count} threads"
        finally:
            torch.ops.masquant_cpu.use_tiles(amx)
            torch.set_num_threads(threads)

    def run(self, operator: str, *args: Any) -> Any:
        return getattr(torch.ops.masquant, operator)(*args)

    def tolerance(
        self, operator: str, args: tuple[Any, ...], expected: Result
    ) -> np.ndarray:
        tolerance = expected.tolerance
        if operator == DOWN:
            return tolerance
        if operator == PRODUCT and args[4] is not None and args[5].dtype == torch.int8:
            # Hidden states are integers in steps of their largest: of 8 bits, as the
            # tokens are, for a result of 16 bits, or of 24.
            steps = 2**23 - 2**15 if args[10] in (torch.float32, torch.float64) else 127
            largest = np.abs(f64(args[4])).max(1, keepdims=True)
            tolerance = tolerance + largest / (2 * steps) * np.abs(f64(args[5])).sum(0)
        if operator == WEIGHT_ONLY:
            tolerance = tolerance + lost_in_16_bits(args[0], expected)
        return tolerance

    def is_exact(self, operator: str, args: tuple[Any, ...]) -> bool:
        # Scales are applied in one order; of a pair sums are in another, and of the
        # groups of few tokens.
        return operator == QUANTIZE or (
            operator == PRODUCT and args[4] is None and not self._sums_groups(args)
        )

    def _sums_groups(self, args: tuple[Any, ...]) -> bool:
        return args[3].shape[1] > 1 and len(args[0]) <= 2


def tiling(m: int, n: int, k: int, split_k: int = 1) -> TileConfig:
    blocks = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, BLOCK_R=16)
    return TileConfig.of(4, 2, **blocks, GROUP_M=2, SPLIT_K=split_k)


def rows(m: int, k: int) -> TileConfig:
    return TileConfig.of(4, 1, BLOCK_M=m, BLOCK_K=k)


def down(m: int, split_k: int) -> TileConfig:
    return TileConfig.of(4, 3, BLOCK_M=m, BLOCK_R=16, BLOCK_K=64, SPLIT_K=split_k)


# Tilings that small tensors fill. Of int_linear fewer than 64 tokens are computed
# transposed; of weight_only_linear up to 16 are smoothed where they are read.
TILINGS = {
    QUANTIZE: {"one block": rows(4, 512), "loop": rows(4, 64), "row loop": rows(1, 64)},
    DOWN: {"one pass": down(16, 1), "split": down(32, 3)},
    PRODUCT: {
        "one pass": tiling(64, 32, 64),
        "transposed": tiling(16, 32, 32),
        "split": tiling(16, 32, 32, 3),
    },
    WEIGHT_ONLY: {
        "one pass": tiling(32, 32, 64),
        "smoothing": tiling(16, 32, 32),
        "split": tiling(16, 32, 32, 3),
    },
}


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """On the GPU, laid out as it is here: ``to`` closes the gaps between elements."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((size,), (1,), 0).to(DEVICE)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Triton(Backend):
    """The Triton kernels, in each of some tilings."""

    name = "triton"
    raises = False
    config: Any = None

    def why_not(self) -> str:
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"

    def ways(self, operator: str) -> Iterator[str]:
        try:
            for way, self.config in TILINGS[operator].items():
                yield way
        finally:
            self.config = None

    def options(self) -> dict[str, Any]:
        """Of a launch, beside the operator's arguments."""
        return {"config": self.config}

    def run(self, operator: str, *args: Any) -> Any:
        found = operators()[operator]
        args = tuple(
            _moved(a) if isinstance(a, torch.Tensor) and DEVICE != "cpu" else a
            for a in args
        )
        found.check(*args)
        y = found.launch(*args, **self.options())
        return tuple(t.cpu() for t in y) if isinstance(y, tuple) else y.cpu()

    def tolerance(
        self, operator: str, args: tuple[Any, ...], expected: Result
    ) -> np.ndarray:
        if operator == DOWN:
            return self._of_down(args, expected)
        if operator == PRODUCT:
            return self._of_product(args, expected)
        # Smoothed tokens are rounded to 16 bits, or cut into three parts of 8 bits;
        # hidden states are in one part, two or three. Triton's interpreter cuts off what
        # does not fit in bfloat16, where a GPU rounds.
        rounded = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
        lost = rounded.get(args[0].dtype, 2.0**-22)
        parts = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-12}
        lost += parts.get(args[12], 2.0**-19)
        if args[12] == torch.bfloat16:
            lost += 2.0**-8
        # Of three parts each product and sum; those of SPLIT_K.
        roundings = 3 * expected.roundings + 8
        return (roundings * UNIT + lost) * expected.size

    def _of_down(self, args: tuple[Any, ...], expected: Result) -> np.ndarray:
        q, l1 = args[0], args[2]
        if l1.dtype == torch.int8:
            # The sum is exact; it is rounded to float32, and so are two products.
            return 3 * UNIT * np.abs(expected.value)
        # One sum for each of K exact products, of at most three parts; two products.
        parts = 3 if l1.dtype == torch.float32 else 1
        split = 8 if self.config is None else self.config["SPLIT_K"]
        return (parts * q.shape[1] + split + 2) * UNIT * expected.size

    def _of_product(self, args: tuple[Any, ...], expected: Result) -> np.ndarray:
        groups, l2, out_dtype = args[3].shape[1], args[5], args[10]
        # Of a block of K (32 at least): the conversion and scale of its sum, and adding
        # it; the token's scale, and three sums of terms.
        blocks = groups * -(-(args[0].shape[1] // groups) // 32)
        tolerance = (2 + blocks + 4) * UNIT * expected.size
        if out_dtype == torch.bfloat16:
            tolerance += 2.0**-8 * np.abs(expected.value)
        if l2 is not None:
            # Roundings of up to six products of parts, each a sum of R. Left over after
            # one, two or three parts of 7 bits, of h; and of an L2 that one part does
            # not hold, and of their product.
            tolerance += 6 * (l2.shape[0] + 1) * UNIT * expected.low_rank
            parts = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-14}
            exact = l2.dtype in (torch.bfloat16, torch.int8)
            lost = (1 if exact else 4) * parts.get(out_dtype, 2.0**-21)
            tolerance += lost * expected.low_rank
        return tolerance


BACKENDS = (Backend(), Cpu(), Triton())
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def exact_down(args: tuple[Any, ...], own: np.ndarray) -> np.ndarray:
    """(T, R) of int8 sums, each of whose scales is one float32 product."""
    q, scale, l1, _, _, low_rank_scale = args
    sums = (f64(q) @ f64(l1)).astype(np.float32) * scale.numpy()
    if low_rank_scale is not None:
        sums = sums * low_rank_scale.numpy()
    return np.where(own, sums, np.float32(0))


def check(backend: Backend, operator: str, given: Operands, ties: float) -> None:
    """Within what float32 may lose, bit by bit where the contract says so."""
    args = given.args(operator)
    for way in backend.ways(operator):
        try:
            found = backend.run(operator, *args)
            check_result(backend, operator, given, args, found, ties)
        except AssertionError as error:
            raise AssertionError(f"{given.case.about} By {way}: {error}") from error
        if operator == PRODUCT and isinstance(backend, Cpu):
            bare = given.args(PRODUCT, low_rank_hidden=None, l2=None)
            if backend.is_exact(PRODUCT, bare):
                expected = reference.int_linear(*bare)
                assert torch.equal(backend.run(PRODUCT, *bare), expected), way


def check_result(
    backend: Backend,
    operator: str,
    given: Operands,
    args: tuple[Any, ...],
    found: Any,
    ties: float,
) -> None:
    if operator == QUANTIZE:
        assert_quantized(*found, *args, ties=ties)
    else:
        expected = ORACLES[operator](*args)
        assert found.dtype == (torch.float32 if operator == DOWN else given.case.dtype)
        tolerance = backend.tolerance(operator, args, expected)
        assert_within(found, expected.value, tolerance)
    if backend.is_exact(operator, args):
        same = getattr(reference, operator)(*args)
        pairs = zip(found, same) if isinstance(found, tuple) else [(found, same)]
        assert all(torch.equal(a, b) for a, b in pairs), "not the reference's bits"
    if operator == DOWN and isinstance(backend, Triton) and args[2].dtype == INT8:
        assert np.array_equal(found.numpy(), exact_down(args, given.own()))
