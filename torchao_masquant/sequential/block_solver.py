# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics and solutions of one block, whose weights are loaded."""

from typing import Any, Callable, Iterator, Optional, Sequence

from torch import nn

from torchao_masquant.calibration.calibrate import check_session, warn_of_few_tokens
from torchao_masquant.calibration.passes import plan_passes
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.sequential.team import Team
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.methods import AUTO, SolverOptions
from torchao_masquant.solver.ranks import spend_ranks

__all__ = ["BlockSolver", "group_cost"]


class BlockSolver:
    """Observes and solves for the linears of one block after the other.

    Args:
        router: that tells the modalities of what the blocks run on.
        options: of the solution.
        max_statistics_bytes: as of ``calibrate``, here of one block.
        team: that shares the work.
        before: number of tokens of each modality in the samples of the processes
            before this one.
    """

    def __init__(
        self,
        router: Router,
        options: SolverOptions,
        max_statistics_bytes: int,
        team: Team,
        before: Sequence[int],
    ):
        self.router, self.options, self.team = router, options, team
        self.max_statistics_bytes = max_statistics_bytes
        self.before = before
        self._warned = False

    def passes(
        self, linears: dict[str, nn.Linear], run: Callable[[], None]
    ) -> list[list[str]]:
        """Linears to be observed at a time.

        Args:
            linears: of the block.
            run: runs the block once, on a sample.
        """
        probe = CalibrationSession(linears, self.router, second_moments=False)
        with probe.watching():
            run()
        second = self.options.parts.per_modality
        return self.team.broadcast(
            plan_passes(probe, second, self.max_statistics_bytes)
        )

    def solve(
        self, linears: dict[str, nn.Linear], runs: Iterator[Any]
    ) -> dict[str, LayerRecipe]:
        """Observe some linears of a block and solve for them.

        Args:
            linears: of one pass.
            runs: runs the block on a sample each time that it is advanced.

        Returns:
            On process 0 name to part of a recipe; empty elsewhere.

        Raises:
            ValueError: as ``calibrate`` does.
        """
        session = CalibrationSession(
            linears,
            self.router,
            self.options.parts.per_modality,
            before=self.before,
        )
        with session.watching():
            for _ in runs:
                pass
        self.team.reduce(session)
        check_session(session, self.options)
        if self.team.rank == 0 and not self._warned:
            self._warned = True
            warn_of_few_tokens(session)
        groups = [
            ({name: linears[name].weight for name in names}, session.statistics[leader])
            for leader, names in session.groups().items()
        ]
        ranks: Optional[dict[str, list[int]]] = None
        if self.options.parts.per_modality and self.options.rank == AUTO:
            ranks = self.team.on_first(lambda: spend_ranks(groups, self.options))
        costs = [
            group_cost(
                [tuple(w.shape) for w in weights.values()],
                len(self.router.modalities),
                self.options,
            )
            for weights, _ in groups
        ]
        layers: dict[str, LayerRecipe] = {}
        for index in self.team.mine(costs):
            weights, statistics = groups[index]
            layers |= solve_group(weights, statistics, self.options, ranks)
        return self.team.collect(layers)


def group_cost(
    shapes: Sequence[tuple[int, ...]], modalities: int, options: SolverOptions
) -> float:
    """Multiplications of :func:`solve_group`, roughly, for linears that share an input.

    Args:
        shapes: (N, K) of each linear.
        modalities: M.
        options: of the solution.
    """
    if not options.parts.per_modality:
        return float(sum(n * k for n, k in shapes))
    attempts = len(options.alphas) + len(options.separations) - 1
    k = shapes[0][1]
    # Decompositions of the covariances, once; GPTQ, gauges and pairs at each attempt.
    cost = 10.0 * k**3 * modalities
    for n, _ in shapes:
        small = min(n, k)
        each = 4.0 * n * k**2 + 10.0 * small**3
        cost += attempts * (modalities * each + 2.0 * n * k**2 + k**3)
    return cost
