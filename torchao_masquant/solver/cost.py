# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What solving for linears that share an input takes, told by their shapes."""

from typing import Sequence

from torchao_masquant.budget import formats
from torchao_masquant.option_values import AUTO
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.in_place import ROWS
from torchao_masquant.solver.layers import ROUNDED_TOGETHER
from torchao_masquant.solver.sampled_outputs import SAMPLED_OUTPUTS
from torchao_masquant.statistics.input_statistics import SAMPLE_TOKENS

__all__ = ["solved_shapes", "solver_bytes", "solver_cost"]

# Bytes that matrix routines take for themselves, as measured.
_SCRATCH = 6 << 20

# Costs in multiplications of float64 matrices, as measured on a CPU: of going through one
# value, and of the eigenvectors of (J, J) for each J^3.
_A_VALUE, _A_CUBE = 200, 5

# Clips that are tried, and the one that is taken.
_CLIPPED = 10


def solver_cost(
    shapes: Sequence[tuple[int, ...]], modalities: int, options: SolverOptions
) -> float:
    """Multiplications that ``solve_group`` takes, to within a factor of two.

    To share work among processes, and to scale what a small linear was measured to take.

    Args:
        shapes: (N, K) of each linear; they share their input.
        modalities: M.
        options: of the solution.
    """
    parts, k = options.procedure, shapes[0][1]
    if not parts.per_modality:
        return float(_A_VALUE * sum(n * k for n, k in shapes))
    jointly = parts.rounding == "gptq"
    differ = _differ(modalities, options, max(options.separations))
    fits = (modalities - 1) * (2 if jointly and differ else 1)
    gauged = fits if differ and parts.gauge else 0
    cost = _A_VALUE * modalities * k**2 + jointly * k**3 / 3
    tries = len(options.alphas) + len(options.separations) - 1
    for n, _ in shapes:
        tried = [n] if tries == 1 else [min(n, SAMPLED_OUTPUTS)] * tries
        # What is chosen on some of the outputs is solved for once more, with all.
        for outputs in tried if n == tried[0] else [*tried, n]:
            products = 2 * gauged + (2.5 if outputs <= k else 1.5) * fits
            products += jointly * (1.25 + modalities * differ)
            passes = (_CLIPPED if parts.clip else 1) + modalities + 2 * gauged + fits
            cost += outputs * k * (k * products + _A_VALUE * passes)
            if options.average_rank(outputs, k):
                cost += _A_CUBE * fits * min(outputs, k) ** 3
    # With a budget each format is solved for, and then the one that is chosen.
    return cost * (1 + len(formats(options, k)) if options.budget else 1)


def _differ(modalities: int, options: SolverOptions, separation: float) -> bool:
    """Whether modalities have factors of their own."""
    return modalities > 1 and separation > 0 and not options.number_format.weight_only


def _noisy(options: SolverOptions) -> bool:
    """Whether rounded activations move the target of the weight, as a rule."""
    return options.number_format.act_bits < 8


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
    # Rounding each weight on its own and putting a recipe together take so much.
    peak = 4 * weight
    if differ and parts.gauge:
        peak = max(peak, 5 * weight)
    if others and options.average_rank(n, k):
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
    if options.rank == AUTO or options.budget:
        # Statistics that are needed again.
        peak += modalities * square
    return held + peak + _SCRATCH


def solved_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(N, K) of each linear that a weight (N, K) or (E, N, K) is solved for as."""
    *experts, n, k = shape
    return [(n, k)] * (experts[0] if experts else 1)
