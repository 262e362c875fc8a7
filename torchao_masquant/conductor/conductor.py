# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Observe, solve: the whole of a model that is in memory, or one block after the other."""

from functools import partial
from typing import Any, Callable, Mapping, Optional, Sequence

import torch

from torchao_masquant.budget import check_budget
from torchao_masquant.calibration.exact_inputs import ExactInputs
from torchao_masquant.calibration.left_out import warn_of_left_out
from torchao_masquant.calibration.passes import Passes
from torchao_masquant.calibration.request import check_session
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor.notices import CalibrationNotices
from torchao_masquant.conductor.team import Team
from torchao_masquant.option_values import AUTO
from torchao_masquant.options import SolverOptions
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.selection import Selected
from torchao_masquant.solver.asymmetric import corrected
from torchao_masquant.solver.choices import Choice, spend_budget
from torchao_masquant.solver.cost import solved_shapes, solver_cost
from torchao_masquant.solver.experts import solve_experts
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.ranks import spend_ranks
from torchao_masquant.statistics.expert_statistics import ExpertStatistics

__all__ = ["Conductor", "solve"]


class Conductor:
    """Finds the layers of a recipe for a part of a model after the other.

    A part is what is selected of a block, or of the whole model. Samples run through it
    as often as the statistics of its inputs need to fit in memory.

    Args:
        router: that tells the modalities of the tokens that parts are called with.
        options: of the solution.
        max_statistics_bytes: bound of the statistics of one pass, in bytes.
        team: that shares samples and solving; None for this process alone.
        before: number of tokens of each modality in the samples of the processes
            before this one.
        exact: see :class:`~torchao_masquant.calibration.session.CalibrationSession`.
        progress: show a bar on a terminal.
    """

    def __init__(
        self,
        router: Router,
        options: SolverOptions,
        max_statistics_bytes: int,
        *,
        team: Optional[Team] = None,
        before: Optional[Sequence[int]] = None,
        exact: Optional[ExactInputs] = None,
        progress: bool = False,
    ):
        self.options, self.progress = options, progress
        self.team = Team.alone() if team is None else team
        self.notices = CalibrationNotices(options)
        #: of each modality, as many as the linear met that met most
        self.tokens = dict.fromkeys(router.modalities, 0)
        self._passes = Passes(
            router,
            options.procedure.per_modality,
            max_statistics_bytes,
            before,
            exact,
        )

    def plan(self, part: Selected, run: Callable[[], object]) -> list[list[str]]:
        """Names of what is to be observed at a time.

        Args:
            part: what is selected of it.
            run: runs the part once, on a sample.

        Raises:
            ValueError: a budget is too little for what is observed at one time.
        """
        passes = self.team.broadcast(self._passes.plan(part, run))
        if self.options.budget and len(passes) > 1:
            # Bytes are spent among the linears of one pass.
            for names in passes:
                check_budget(
                    part.where(names.__contains__).widths,
                    len(self.tokens),
                    self.options,
                    part=" of one of several passes (see max_statistics_bytes)",
                )
        return passes

    def layers(
        self,
        part: Selected,
        passes: Sequence[Sequence[str]],
        run: Callable[[int], object],
        *,
        factors: Optional[Mapping[str, torch.Tensor]] = None,
        foldable: Optional[Mapping[str, torch.Tensor]] = None,
        is_last: bool = False,
    ) -> dict[str, LayerRecipe]:
        """Observe a part of the model, and solve for it.

        Args:
            part: what is selected of it.
            passes: of :meth:`plan`.
            run: runs the part on all samples of this process; called with the number of
                the pass, from 1 on.
            factors: smoothing factors by name of the linear; None: in closed form.
            foldable: see :func:`solve`.
            is_last: whether no part follows; notices are told before it is solved for.

        Returns:
            On process 0 name to layer, of all but those that were called with other
            tokens than the model's (:meth:`tell_left_out`); empty elsewhere.

        Raises:
            ValueError: as :func:`~torchao_masquant.calibrate`.
        """
        layers: dict[str, LayerRecipe] = {}
        for number, names in enumerate(passes, start=1):
            session = self._passes.observe(
                part.where(names.__contains__), partial(run, number)
            )
            self.team.reduce(session)
            self._count(session)
            check_session(session, self.options)
            self._passes.left_out.update(session.not_matched)
            if self.team.rank == 0:
                self.notices.see(session)
                if is_last and number == len(passes):
                    self.notices.tell()
            layers |= solve(
                session,
                self.options,
                team=self.team,
                factors=factors,
                foldable=foldable,
                progress=self.progress,
                spend_statistics=True,
            )
        return layers

    def tell_left_out(self, part: Selected) -> None:
        """Name what has no layer, of a part that has been through :meth:`layers`."""
        if self.team.rank == 0:
            warn_of_left_out([n for n in part.layers if n in self._passes.left_out])

    def _count(self, session: CalibrationSession) -> None:
        only_towers = session.towers.keys() >= session.linears.keys()
        for name, statistics in session.statistics.items():
            # Towers meet other tokens than those that a call has.
            if name in session.towers and not only_towers:
                continue
            # They count a token once for each of its experts.
            if not isinstance(statistics, ExpertStatistics):
                for met, moments in zip(statistics.modalities, statistics.moments):
                    self.tokens[met] = max(self.tokens[met], moments.count)


def solve(
    session: CalibrationSession,
    options: SolverOptions,
    *,
    team: Optional[Team] = None,
    factors: Optional[Mapping[str, torch.Tensor]] = None,
    foldable: Optional[Mapping[str, torch.Tensor]] = None,
    progress: bool = False,
    spend_statistics: bool = False,
) -> dict[str, LayerRecipe]:
    """Solve for all linears and experts of a session that has seen its data.

    Args:
        session: that :func:`check_session` lets pass; its linears still hold their
            high-precision weights.
        options: of the solution.
        team: that shares the work; None for this process alone.
        factors: smoothing factors by name of the linear; None: in closed form.
        foldable: name of a linear whose factor can be folded to the channels that have
            it, see :func:`~torchao_masquant.solver.smoothing.smoothing_factors`.
        progress: show a bar on a terminal.
        spend_statistics: use and free the memory of the session's second moments.

    Returns:
        On process 0 name of each linear, and of each weight of experts, to its part of
        a recipe, but for those that were called with other tokens than the model's;
        empty elsewhere.
    """
    team = Team.alone() if team is None else team
    groups = [
        (
            {name: session.linears[name].weight for name in names},
            session.statistics[leader],
        )
        for leader, names in session.groups().items()
        if leader in session.linears
    ]
    corrections = []
    for index, (weights, statistics) in enumerate(groups):
        if statistics.drifts:
            corrections.append(corrected(weights, statistics, options))
            groups[index] = (corrections[-1].weights, statistics)
    chosen: Optional[list[Choice]] = None
    if options.budget:
        chosen = team.on_first(lambda: spend_budget(groups, options, progress=progress))
    ranks: Optional[dict[str, list[int]]] = None
    if chosen is None and options.procedure.per_modality and options.rank == AUTO:
        ranks = team.on_first(lambda: spend_ranks(groups, options, progress=progress))
    shapes: list[list[tuple[int, ...]]] = []
    tasks: list[Callable[[], Mapping[str, Any]]] = []
    for index, (weights, statistics) in enumerate(groups):
        shapes.append([tuple(weight.shape) for weight in weights.values()])
        if chosen is not None:
            tasks.append(
                partial(
                    chosen[index].solve,
                    weights,
                    statistics,
                    spend_statistics=spend_statistics,
                )
            )
            continue
        tasks.append(
            partial(
                solve_group,
                weights,
                statistics,
                options.of_towers if session.towers.keys() & weights else options,
                ranks,
                factors=factors,
                channels=_channels(foldable or {}, list(weights)),
                spend_statistics=spend_statistics,
            )
        )
    for name, experts in session.experts.items():
        if name in session.layers:
            shapes.append(solved_shapes(tuple(experts.weight.shape)))
            tasks.append(
                partial(
                    _solve_experts,
                    name,
                    experts.weight,
                    session,
                    options,
                    spend_statistics,
                )
            )
    modalities = len(session.router.modalities)
    mine = team.mine([solver_cost(shape, modalities, options) for shape in shapes])
    found: dict[str, LayerRecipe] = {}
    for index in progress_bar(mine, desc="Solving", show=progress):
        found |= tasks[index]()
    for correction in corrections:
        found |= correction.applied(found)
    for name in found.keys() & session.towers.keys():
        found[name].modalities = session.modalities_of(name)
        found[name].scheme = options.towers
    found = team.collect(found)
    return {name: found[name] for name in session.layers} if team.rank == 0 else {}


def _channels(
    foldable: Mapping[str, torch.Tensor], names: Sequence[str]
) -> Optional[torch.Tensor]:
    """Of linears that share an input, where the factor of all of them can be folded."""
    return foldable[names[0]] if all(n in foldable for n in names) else None


def _solve_experts(
    name: str,
    weight: torch.Tensor,
    session: CalibrationSession,
    options: SolverOptions,
    spend_statistics: bool,
) -> dict[str, LayerRecipe]:
    statistics = session.statistics[name]
    layer = solve_experts(
        name, weight, statistics, options, spend_statistics=spend_statistics
    )
    return {name: layer}
