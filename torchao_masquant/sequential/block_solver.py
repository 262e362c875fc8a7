# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics and solutions of one block, whose weights are loaded."""

from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.calibration.left_out import warn_of_left_out
from torchao_masquant.calibration.passes import plan_passes
from torchao_masquant.calibration.request import check_session
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.experts import ExpertWeight
from torchao_masquant.notices import CalibrationNotices
from torchao_masquant.option_values import AUTO
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.sequential.team import Team
from torchao_masquant.solver.cost import solver_cost
from torchao_masquant.solver.experts import solve_experts
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.ranks import spend_ranks

__all__ = ["BlockLayers", "BlockSolver", "solved_shapes"]


@dataclass(frozen=True)
class BlockLayers:
    """What is quantized of one block, or of a part of it.

    Attributes:
        linears: name in the model to module.
        experts: name in the model to the weights of a mixture's experts.
    """

    linears: dict[str, nn.Linear]
    experts: dict[str, ExpertWeight]

    @property
    def names(self) -> list[str]:
        """Of linears, and of weights of experts behind them."""
        return [*self.linears, *self.experts]

    def where(self, chosen: Callable[[str], bool]) -> "BlockLayers":
        """Those whose name is chosen."""
        return BlockLayers(
            {name: m for name, m in self.linears.items() if chosen(name)},
            {name: w for name, w in self.experts.items() if chosen(name)},
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(N, K) of each linear, (E, N, K) of each weight of experts."""
        linears = {n: (m.out_features, m.in_features) for n, m in self.linears.items()}
        return linears | {n: tuple(w.weight.shape) for n, w in self.experts.items()}

    def parameters(self) -> dict[str, tuple[str, torch.Tensor]]:
        """By name, what its parameter is called, and the weight, as it is quantized."""
        linears = {n: (f"{n}.weight", m.weight.data) for n, m in self.linears.items()}
        return linears | {n: (n, w.weight) for n, w in self.experts.items()}


class BlockSolver:
    """Observes and solves for the linears and experts of one block after the other.

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
        self.notices = CalibrationNotices(options)
        self._at_first = True

    def passes(self, layers: BlockLayers, run: Callable[[], None]) -> list[list[str]]:
        """Names of what is to be observed at a time.

        Args:
            layers: of the block.
            run: runs the block once, on a sample.
        """
        probe = CalibrationSession(
            dict(layers.linears), self.router, False, layers.experts
        )
        probe.has_first = self._at_first
        with probe.watching():
            run()
        second = self.options.procedure.per_modality
        return self.team.broadcast(
            plan_passes(probe, second, self.max_statistics_bytes)
        )

    def solve(self, chosen: BlockLayers, runs: Iterator[Any]) -> dict[str, LayerRecipe]:
        """Observe some linears and experts of a block and solve for them.

        Args:
            chosen: those of one pass.
            runs: runs the block on a sample each time that it is advanced.

        Returns:
            On process 0 name to part of a recipe, as :func:`solve` gives it; empty
            elsewhere.

        Raises:
            ValueError: as ``calibrate`` does.
        """
        session = CalibrationSession(
            dict(chosen.linears),
            self.router,
            self.options.procedure.per_modality,
            chosen.experts,
            self.before,
        )
        session.has_first, self._at_first = self._at_first, False
        with session.watching():
            for _ in runs:
                pass
        self.team.reduce(session)
        check_session(session, self.options)
        if self.team.rank == 0:
            warn_of_left_out(session.not_matched)
            self.notices.see(session)
        groups = [
            (
                {name: chosen.linears[name].weight for name in names},
                session.statistics[leader],
            )
            for leader, names in session.groups().items()
            if leader in chosen.linears
        ]
        experts = [(n, e) for n, e in chosen.experts.items() if n in session.layers]
        ranks: Optional[dict[str, list[int]]] = None
        if self.options.procedure.per_modality and self.options.rank == AUTO:
            ranks = self.team.on_first(lambda: spend_ranks(groups, self.options))
        costs = [
            solver_cost(shapes, len(self.router.modalities), self.options)
            for shapes in (
                *([tuple(w.shape) for w in weights.values()] for weights, _ in groups),
                *(solved_shapes(tuple(w.weight.shape)) for _, w in experts),
            )
        ]
        layers: dict[str, LayerRecipe] = {}
        for index in self.team.mine(costs):
            if index < len(groups):
                weights, statistics = groups[index]
                layers |= solve_group(
                    weights, statistics, self.options, ranks, spend_statistics=True
                )
            else:
                name, weight = experts[index - len(groups)]
                layers[name] = solve_experts(
                    name,
                    weight.weight,
                    session.statistics[name],
                    self.options,
                    spend_statistics=True,
                )
        return self.team.collect(layers)


def solved_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(N, K) of each linear that a weight (N, K) or (E, N, K) is solved for as."""
    *experts, n, k = shape
    return [(n, k)] * (experts[0] if experts else 1)
