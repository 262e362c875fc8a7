# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The step "prepare", and "convert" of what it observed."""

import copy
from functools import partial
from typing import Callable, Mapping

from torch import nn

from torchao_masquant.calibration.left_out import warn_of_left_out
from torchao_masquant.calibration.observed_experts import MASQuantObservedExperts
from torchao_masquant.calibration.request import (
    base_first,
    check_request,
    check_session,
)
from torchao_masquant.calibration.session import (
    CalibrationSession,
    MASQuantObservedLinear,
)
from torchao_masquant.conductor import solve
from torchao_masquant.config import MASQuantConfig
from torchao_masquant.convert import convert_linear
from torchao_masquant.experts import ExpertWeight
from torchao_masquant.in_memory import check_in_memory, is_hooked
from torchao_masquant.notices import CalibrationNotices
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.steps.actions import (
    Actions,
    by_module,
    conversion_of_experts,
    needs_router,
    select_rest,
)

__all__ = ["OBSERVED", "plan_observed", "plan_prepare"]

# What a "prepare" step leaves.
OBSERVED = (MASQuantObservedLinear, MASQuantObservedExperts)


def plan_prepare(model: nn.Module, config: MASQuantConfig) -> Actions:
    """Observe what is chosen.

    Raises:
        ValueError: as :func:`~torchao_masquant.selection.select`.
    """
    modalities = base_first(model, config.base_modality, config.modalities)
    second_moments = config.options.procedure.per_modality
    observed = [m for m in model.modules() if isinstance(m, OBSERVED)]
    session = next(
        (
            m.session
            for m in observed
            if not m.session.leaders
            and m.session.second_moments == second_moments
            and m.session.router.modalities == modalities
        ),
        None,
    )
    # A session that has seen nothing yet may be that of a call that did not finish.
    done = {m for m in observed if m.session is session}
    selected = select_rest(model, config, modalities, done)
    check_request(model, selected, modalities, config.options)
    if is_hooked(model):
        # Elsewhere values may still be loaded; these never are, but during calls.
        for name, weight in selected.weights.items():
            check_in_memory(name, weight, model)
    if session is None:
        # Another part of the model may be observed already, by another config.
        router = next((m.session.router for m in observed), None)
        if router is None or router.modalities != modalities:
            router = Router.for_model(model, modalities)
            router.skip_padding = True
            router.attach(model)
        session = CalibrationSession({}, router, second_moments)
    actions: Actions = {
        linear: partial(session.attach_linear, name, linear)
        for name, linear in selected.linears.items()
    }
    for experts, weights in by_module(selected.experts).items():
        actions[experts] = partial(_observe_experts, session, weights)
    return actions


def _observe_experts(
    session: CalibrationSession, weights: Mapping[str, ExpertWeight]
) -> None:
    for name, weight in weights.items():
        session.attach_experts(name, weight)


def plan_observed(
    model: nn.Module, config: MASQuantConfig, session: CalibrationSession
) -> Actions:
    """Quantize what a session observed.

    Raises:
        ValueError: as :func:`~torchao_masquant.conductor.check_session`; it
            kept too little for the method.
    """
    if config.options.procedure.per_modality and not session.second_moments:
        raise ValueError(
            f"method {config.method!r} needs covariances that step 'prepare' was not "
            "told to keep: give both steps the same method."
        )
    for name, observed in session.weights.items():
        check_in_memory(name, observed, model)
    layers = _solution(session, config.options)
    warn_of_left_out(session.not_matched)
    linears = {n: m for n, m in session.linears.items() if isinstance(m, OBSERVED)}
    experts = {
        module: weights
        for module, weights in by_module(session.experts).items()
        if isinstance(module, OBSERVED)
    }
    router = session.router
    router.detach(model)
    mine = {*linears.values(), *experts}
    if needs_router(router, layers) or any(
        getattr(m, "router", None) is router and m not in mine for m in model.modules()
    ):
        router.attach(model)
    actions: Actions = {
        linear: partial(_convert_observed, session, name, layers[name], config, router)
        if name in layers
        else partial(session.detach_linear, linear)
        for name, linear in linears.items()
    }
    for module, weights in experts.items():
        if not layers.keys() >= weights.keys():
            actions[module] = partial(session.detach_experts, module)
            continue
        convert = conversion_of_experts(
            module, {n: layers[n] for n in weights}, weights, config, router
        )
        actions[module] = partial(_convert_observed_experts, session, weights, convert)
    return actions


def _solution(
    session: CalibrationSession, options: SolverOptions
) -> dict[str, LayerRecipe]:
    """What a session is solved for; the same again where only a part was converted.

    Raises:
        ValueError: as :func:`check_session`; or a part was converted with other options, or
            before more data was observed.
    """
    for known, layers in session.solutions:
        if known == options:
            return layers
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
    modules = {name: getattr(x, "module", x) for name, x in session.layers.items()}
    gone = {name for name, m in modules.items() if not isinstance(m, OBSERVED)}
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


def _convert_observed_experts(
    session: CalibrationSession,
    weights: Mapping[str, ExpertWeight],
    convert: Callable[[], object],
) -> None:
    experts = next(iter(weights.values())).module
    # As for linears.
    session.router.skip_padding = False
    session.detach_experts(experts)
    try:
        convert()
    except BaseException:
        _observe_experts(session, weights)
        raise


def _convert_observed(
    session: CalibrationSession,
    name: str,
    layer: LayerRecipe,
    config: MASQuantConfig,
    router: Router,
) -> None:
    linear = session.linears[name]
    # From now on padding is base, as quantized linears want it.
    router.skip_padding = False
    session.detach_linear(linear)
    try:
        convert_linear(
            linear,
            name,
            layer,
            config.options.number_format,
            router.modalities,
            router,
            config.options.low_rank_bits,
        )
    except BaseException:
        # It is still to be converted, by the next call.
        session.attach_linear(name, linear)
        raise
