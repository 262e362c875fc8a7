# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operations and bytes of solving for linears that share an input, counted by shape.

Counted along :mod:`torchao_masquant.solver.layers`: what changes there changes here.
"""

from dataclasses import astuple, dataclass
from typing import Sequence

from torchao_masquant.calibration.statistics import SAMPLE_TOKENS
from torchao_masquant.option_values import AUTO
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.in_place import ROWS
from torchao_masquant.solver.layers import ROUNDED_TOGETHER, rounded_together
from torchao_masquant.solver.ranks import average_rank
from torchao_masquant.solver.rotation import halves
from torchao_masquant.solver.sampled_outputs import SAMPLED_OUTPUTS

__all__ = ["MULTIPLICATIONS", "Work", "solver_bytes", "solver_work"]

#: Clips that are tried, and the one that is taken.
_CLIPPED = 10

# That matrix routines take for themselves, as measured.
_SCRATCH = 6 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Operations; the seconds of a machine are a sum over them.

    Attributes:
        macs: multiplications and additions of float64 matrices; those of float32 count
            half.
        cubes: J^3 of the eigenvectors of symmetric matrices (J, J).
        squares: J^2 of them.
        values: of weights, each as often as it is gone through.
        entries: of covariances, each as often as it is gone through.
        channels: that are rounded one after the other.
        calls: of routines that go through a weight.
    """

    macs: float = 0.0
    cubes: float = 0.0
    squares: float = 0.0
    values: float = 0.0
    entries: float = 0.0
    channels: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * a for a in astuple(self)))

    def dot(self, each: "Work") -> float:
        """Sum of all operations, each kind times what one of it takes."""
        return sum(a * b for a, b in zip(astuple(self), astuple(each)))


#: What each operation takes in multiplications, roughly, as measured on a CPU.
MULTIPLICATIONS = Work(macs=1, cubes=5, values=200, entries=200)


def solver_work(
    shapes: Sequence[Shape], modalities: int, options: SolverOptions
) -> Work:
    """Of one call of ``solve_group``.

    Args:
        shapes: (N, K) of each linear.
        modalities: M.
        options: of the solution.
    """
    if not options.procedure.per_modality:
        return Work(values=sum(n * k for n, k in shapes), calls=len(shapes))
    k = shapes[0][1]
    work = Work(entries=modalities * k * k)
    alphas, separations = options.alphas, options.separations
    tried = [separations[0]] * len(alphas) + list(separations[1:])
    if len(tried) == 1:
        return work + _solution(shapes, modalities, options, tried, False)
    some = [(min(n, SAMPLED_OUTPUTS), k) for n, k in shapes]
    work += _solution(some, modalities, options, tried, True)
    if some != [tuple(shape) for shape in shapes]:
        # Any of them may be taken: that which takes longest.
        work += _solution(shapes, modalities, options, [max(separations)], False)
    return work


def _solution(
    shapes: Sequence[Shape],
    modalities: int,
    options: SolverOptions,
    separations: Sequence[float],
    judged: bool,
) -> Work:
    """Of attempts at the same problem, each with its separation."""
    others, k = modalities - 1, shapes[0][1]
    work = Work()
    if others and average_rank(options, *shapes[0]) and any(n > k for n, _ in shapes):
        work += (_eigen(k) + Work(entries=4 * k * k)) * others
    for separation in separations:
        differ = _differ(modalities, options, separation)
        work += _joint(shapes, modalities, options)
        for n, _ in shapes:
            work += _attempt(n, k, modalities, options, differ)
            if judged:
                judging = 2 * modalities * min(SAMPLE_TOKENS, 256) * n * k
                work += Work(judging, values=2 * n * k, calls=1 + modalities)
    return work


def _differ(modalities: int, options: SolverOptions, separation: float) -> bool:
    """Whether modalities have factors of their own."""
    return modalities > 1 and separation > 0 and not options.number_format.weight_only


def _rotated(rows: float, k: int, options: SolverOptions) -> Work:
    """Of rows of K float64 values."""
    size = options.hadamard_size_of(k)
    return Work() if size is None else Work(rows * k * sum(halves(size)))


def _joint(shapes: Sequence[Shape], modalities: int, options: SolverOptions) -> Work:
    """Of the Hessian, and of the channels that are rounded one after the other."""
    parts, k = options.procedure, shapes[0][1]
    jointly = parts.rounding == "gptq"
    if not (jointly or parts.clip):
        return Work()
    work = Work(entries=modalities * k * k) + _rotated(2 * k, k, options)
    if not jointly:
        return work
    batches = rounded_together([n * k for n, _ in shapes])
    work += Work(k**3 / 3, entries=k * k, channels=k * len(batches))
    if not options.number_format.weight_only:
        work += _rotated(modalities * SAMPLE_TOKENS, k, options)
    return work


def _attempt(
    n: int, k: int, modalities: int, options: SolverOptions, differ: bool
) -> Work:
    """Of one exponent and separation, for one linear."""
    parts, others = options.procedure, modalities - 1
    jointly, rank = parts.rounding == "gptq", average_rank(options, n, k)
    passes = (_CLIPPED if parts.clip else 1) + modalities
    work, met = Work(), _rotated(n, k, options)
    if differ and parts.gauge:
        fits = others * (1 + (jointly or parts.clip))
        passes += 1 + 2 * fits
        work += (met + Work(2 * n * k * k)) * fits
    if rank:
        fits = others * (1 + (jointly and differ))
        passes += fits
        work += (met + _pair(n, k, rank) + _rotated(rank, k, options)) * fits
    if jointly:
        # Two triangular solutions, and what float32 rounding moves on.
        solved = differ or _noisy(options)
        work += met + Work(n * k * k * solved + n * k * k / 4)
        if differ:
            down = _rotated(rank, k, options) + Work(rank * k * (n + k))
            work += met + Work(modalities * n * k * k) + down * others
    return work + Work(values=passes * n * k, calls=passes)


def _noisy(options: SolverOptions) -> bool:
    """Whether rounded activations move the target of the weight, as a rule."""
    return options.number_format.act_bits < 8


def _eigen(size: int) -> Work:
    return Work(cubes=size**3, squares=size**2)


def _pair(n: int, k: int, rank: int) -> Work:
    if n <= k:
        return _eigen(n) + Work(n * k * k + n * n * k + rank * n * k)
    return _eigen(k) + Work(2 * n * k * k + rank * k * (k + n))


def solver_bytes(
    n: int, k: int, beside: int, modalities: int, options: SolverOptions
) -> int:
    """Peak memory while one linear (N, K) is solved for, less weights and statistics.

    Covariances are taken to be made in the memory of the statistics.

    Args:
        n: outputs.
        k: inputs.
        beside: N K of all linears that share the input, of itself too.
        modalities: M.
        options: of the solution.
    """
    weight, square = 8 * n * k, 8 * k * k
    if not options.procedure.per_modality:
        # Rounding holds copies in float32 and integers.
        return 2 * weight
    parts, others = options.procedure, modalities - 1
    jointly = parts.rounding == "gptq"
    differ = _differ(modalities, options, max(options.separations))
    tries = len(options.alphas) + len(options.separations) - 1
    # Sampled tokens; integers as they were and as they are, and those of the best try.
    held = 8 * modalities * SAMPLE_TOKENS * k + beside * (2 + (tries > 1))
    # What rounding each weight on its own and putting a recipe together take.
    peak = 4 * weight
    if differ and parts.gauge:
        peak = max(peak, 5 * weight)
    if others and average_rank(options, n, k):
        # The first pairs are found while there is a Hessian.
        fitting = square if jointly and differ else 0
        if n <= k:
            # A matrix (N, N), its symmetric half, vectors and work space.
            fitting += 2 * weight + 5 * 8 * n * n
        else:
            # Whitenings stay for all attempts.
            held += 2 * others * square
            fitting += weight + 2 * square + max(5 * square, weight + 2 * square)
        peak = max(peak, fitting)
    if jointly or parts.clip:
        # The Hessian, which turns into its factor, and what is done to it row by row.
        peak = max(peak, square + 3 * 8 * ROWS * k)
    if jointly:
        batch = 8 * min(beside, max(ROUNDED_TOGETHER, n * k))
        aim = 9 if differ else 5 if _noisy(options) else 4
        peak = max(
            peak,
            square + batch - weight + aim * weight,
            # Targets, in the order of the factor, and both once more in float32.
            square + max(7 * batch // 2, (13 * batch + 2 * square) // 4),
        )
    if options.rank == AUTO:
        # Statistics that are needed again.
        peak += modalities * square
    return held + peak + _SCRATCH
