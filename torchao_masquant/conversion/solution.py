# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a session is solved for, whose linears may be converted in several calls."""

import copy

from torchao_masquant.calibration.observed_experts import MASQuantObservedExperts
from torchao_masquant.calibration.request import check_session
from torchao_masquant.calibration.session import (
    CalibrationSession,
    MASQuantObservedLinear,
)
from torchao_masquant.conductor.conductor import solve
from torchao_masquant.conductor.notices import CalibrationNotices
from torchao_masquant.models.experts import module_of
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe

__all__ = ["OBSERVED", "solution_of"]

#: What a "prepare" step makes of linears and experts.
OBSERVED = (MASQuantObservedLinear, MASQuantObservedExperts)


def solution_of(
    session: CalibrationSession, options: SolverOptions
) -> dict[str, LayerRecipe]:
    """Solve a session; the same again where only a part of it was converted since.

    Raises:
        ValueError: the session kept too little for the method; as :func:`check_session`;
            or a part was converted with other options, or before more data was observed.
    """
    for known, layers in session.solutions:
        if known == options:
            return layers
    if options.procedure.per_modality and not session.second_moments:
        raise ValueError(
            f"method {options.method!r} needs covariances that step 'prepare' was not "
            "told to keep: give both steps the same method."
        )
    rest = _rest_of(session)
    check_session(rest, options)
    notices = CalibrationNotices(options)
    notices.see(rest)
    notices.tell()
    layers = solve(rest, options, progress=True)
    session.solutions.append((options, layers))
    return layers


def _rest_of(session: CalibrationSession) -> CalibrationSession:
    """A session without what is quantized already.

    Raises:
        ValueError: a linear that is left read the same input as one that is quantized.
    """
    gone = {
        name
        for name, layer in session.layers.items()
        if not isinstance(module_of(layer), OBSERVED)
    }
    for names in session.groups().values():
        left = [name for name in names if name not in gone]
        if left and len(left) < len(names):
            other = next(name for name in names if name in gone)
            raise ValueError(
                f"{left[0]} reads the same input as {other}, which is quantized "
                "already, with other options or from less data: quantize both with the "
                "same, or give each a step 'prepare' of its own."
            )
    rest = copy.copy(session)
    rest.linears = {n: m for n, m in session.linears.items() if n not in gone}
    rest.experts = {n: w for n, w in session.experts.items() if n not in gone}
    rest.leaders = {n: v for n, v in session.leaders.items() if n not in gone}
    rest.statistics = {n: s for n, s in session.statistics.items() if n not in gone}
    return rest
