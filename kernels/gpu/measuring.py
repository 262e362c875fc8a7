# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the tilings of a call, and what a library has for it, and keeps the fastest.

Nothing is measured unless it is asked for, so no first call takes minutes:

- :func:`tune` measures linears of given shapes;
- with ``MASQUANT_TUNE=1`` an eager call on a GPU measures, once, what no table knows of
  it, with its own tensors. A compiled graph takes what was known when it was traced:
  run the model eagerly first, then compile it.

What wins goes to the user's table of the architecture, at once and whole. Of medians
within 2 % of the least the first candidate wins, so that noise does not choose.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Optional, Sequence

import torch

from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.library_products import LIBRARY_PRODUCTS
from torchao_masquant.kernels.gpu.operators import operators
from torchao_masquant.kernels.gpu.tuning import (
    Entry,
    LibraryProduct,
    Question,
    forget_tables,
    measured,
    questions,
    table_name,
    user_table,
)

__all__ = [
    "LinearShape",
    "Measured",
    "gpu_clock",
    "linear_calls",
    "measure_call",
    "tune",
]

_ROUNDS = 3
_TIE = 1.02

Clock = Callable[[Callable[[], Any]], float]


class Measured(NamedTuple):
    """What came of one call.

    Attributes:
        question: which entry it is.
        entry: the winner.
        times: milliseconds of each candidate that runs, medians, in the order tried.
    """

    question: Question
    entry: Entry
    times: tuple[tuple[Entry, float], ...]


def gpu_clock(call: Callable[[], Any]) -> float:
    """Median milliseconds on the GPU, with a cold second-level cache."""
    import triton.testing

    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def measure_call(
    name: str,
    launch: Callable[..., Any],
    args: Sequence[Any],
    *,
    clock: Clock = gpu_clock,
    again: bool = False,
) -> Optional[Measured]:
    """Find what is fastest for a call, and write it down.

    Args:
        name: of the operator, such as "int_linear".
        launch: launches its kernels; takes a ``config``.
        args: of the call, its tensors on a GPU.
        clock: milliseconds of a call.
        again: also where a table knows already.

    Returns:
        None where a table knows already.

    Raises:
        RuntimeError: two candidates give different results, or none runs.
    """
    device = args[0].device
    table = table_name(device)
    if table is None:
        raise RuntimeError(f"there are no tables for {device}: tilings are for GPUs.")
    with questions() as asked:
        expected = launch(*args)
    # Some launch the kernels of other operators too.
    question = next(q for q in asked if q.kernel.split()[0] == name)
    if not again and measured(question.kernel, question.key, device) is not None:
        return None
    candidates: list[tuple[Entry, Callable[[], Any]]] = []
    for label, product in LIBRARY_PRODUCTS.items():
        if product.operator == name and product.takes(*args):
            call = _bound(product.run, args)
            candidates.append((LibraryProduct(label), call))
    for config in question.configs:
        candidates.append((config, _bound(launch, args, config)))
    candidates = [c for c in candidates if _agrees(c, expected)]
    if not candidates:
        raise RuntimeError(f"no tiling of {question.kernel} runs on {device}.")
    rounds = [[clock(call) for _, call in candidates] for _ in range(_ROUNDS)]
    times = [statistics.median(times) for times in zip(*rounds)]
    winner = next(i for i, time in enumerate(times) if time <= _TIE * min(times))
    entry = candidates[winner][0]
    _write(table, question, entry)
    return Measured(
        question, entry, tuple((e, time) for (e, _), time in zip(candidates, times))
    )


def _bound(
    run: Callable[..., Any], args: Sequence[Any], config: Optional[TileConfig] = None
) -> Callable[[], Any]:
    if config is None:
        return lambda: run(*args)
    return lambda: run(*args, config=config)


def _agrees(candidate: tuple[Entry, Callable[[], Any]], expected: Any) -> bool:
    """Whether a candidate runs; it must give what the others do.

    Raises:
        RuntimeError: it gives something else.
    """
    from triton.runtime.errors import OutOfResources

    entry, call = candidate
    try:
        result = call()
    except OutOfResources:
        # More shared memory or registers than this GPU has.
        return False
    pairs = [(result, expected)] if isinstance(result, torch.Tensor) else []
    for ours, theirs in pairs or zip(result, expected):
        # Sums in another order, and operands rounded to 8 bits on the way.
        most = float(theirs.float().abs().max()) if theirs.numel() else 0.0
        try:
            torch.testing.assert_close(
                ours.float(), theirs.float(), rtol=0, atol=2.0**-5 * most
            )
        except AssertionError as error:
            raise RuntimeError(
                f"{entry} gives another result than the others, so nothing was written "
                f"down: {error}"
            ) from error
    return True


def _write(table: str, question: Question, entry: Entry) -> None:
    path = user_table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(question.kernel, {})[question.key] = entry.to_json()
    # Whole or not at all.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        made.write_text(json.dumps(known, indent=1, sort_keys=True))
        os.replace(made, path)
    forget_tables()


class LinearShape(NamedTuple):
    """A linear to tune for.

    Attributes:
        out_features: N.
        in_features: K.
        weight_bits: 8, 4 or 3.
        act_bits: 8, or 16: weight-only.
        group_size: of the weight; None for one scale a channel.
        rank: of the low-rank pairs, of all modalities together; 0 for none.
        low_rank_bits: 16 or 8, of the pairs.
    """

    out_features: int
    in_features: int
    weight_bits: int = 8
    act_bits: int = 8
    group_size: Optional[int] = None
    rank: int = 0
    low_rank_bits: int = 16


def tune(
    shapes: Iterable[LinearShape],
    tokens: Iterable[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: Optional[torch.device] = None,
    clock: Clock = gpu_clock,
    again: bool = False,
    tell: Callable[[Measured], None] = lambda measured: None,
) -> Path:
    """Measure linears, each with every number of tokens, and write down what wins.

    Of each of about a dozen candidates 50 ms three times, and before the first of them its
    compilation.

    Args:
        shapes: of the linears.
        tokens: numbers of tokens; tables round them up to powers of two.
        dtype: of tokens and results.
        device: a GPU; None for the current one.
        clock: milliseconds of a call.
        again: also what a table knows already.
        tell: called with the result of each measurement.

    Returns:
        The user's table of the device's architecture.

    Raises:
        RuntimeError: there is no GPU, or a candidate gives a wrong result.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    name = table_name(device)
    if name is None:
        raise RuntimeError(f"there are no tables for {device}: tilings are for GPUs.")
    counts = sorted(set(tokens))
    for shape in shapes:
        for count in counts:
            for operator, args in linear_calls(shape, count, dtype, device):
                found = measure_call(
                    operator,
                    operators()[operator].launch,
                    args,
                    clock=clock,
                    again=again,
                )
                if found is not None:
                    tell(found)
    return user_table(name)


def linear_calls(
    shape: LinearShape, tokens: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, tuple[Any, ...]]]:
    """The operators of a linear, and what they are called with."""
    generator = torch.Generator(device).manual_seed(0)

    def integers(least: int, most: int, *size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randint(
            least, most, size, generator=generator, dtype=kind, device=device
        )

    def floats(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    n, k = shape.out_features, shape.in_features
    groups = 1 if shape.group_size is None else k // shape.group_size
    if shape.weight_bits <= 4:
        qdata = integers(0, 256, n, (k + 1) // 2, kind=torch.uint8)
    else:
        qdata = integers(-127, 128, n, k, kind=torch.int8)
    scale = floats(n, groups).abs() / 2**shape.weight_bits / k**0.5
    pre_scale = floats(2, k).abs() + 0.5
    x = floats(tokens, k).to(dtype)
    bits = shape.weight_bits
    if shape.act_bits == 16:
        zero_point = integers(-8, 8, n, groups, kind=torch.int8)
        operands = (x, pre_scale, qdata, scale, zero_point)
        rest: tuple[Any, ...] = ([], bits, dtype, None)
        return [("weight_only_linear", (*operands, *(None,) * 5, *rest))]
    qx = integers(-127, 128, tokens, k, kind=torch.int8)
    x_scale = floats(tokens, 1).abs() / 127
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("smooth_quantize", (x, pre_scale, None, shape.act_bits, None)),
        ("int_linear", (qx, x_scale, qdata, scale, *(None,) * 5, bits, dtype)),
    ]
    if shape.rank:
        l1, factors = (floats(k, shape.rank) / k**0.5).to(dtype), None
        if shape.low_rank_bits == 8:
            l1 = integers(-127, 128, k, shape.rank, kind=torch.int8)
            factors = floats(shape.rank).abs() / 127
        ids = torch.ones(tokens, dtype=torch.int64, device=device)
        down = (qx, x_scale, l1, ids, [shape.rank], factors)
        calls.append(("low_rank_down", down))
    return calls
