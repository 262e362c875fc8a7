# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate``: from a model and data to a recipe."""

import itertools
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.calibration.foldable import foldable_channels, showing_all
from torchao_masquant.calibration.request import (
    base_first,
    check_request,
    check_session,
)
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor.asymmetric import calibrate_blocks
from torchao_masquant.conductor.conductor import Conductor
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.learning import learn
from torchao_masquant.learning.published import PublishedTask
from torchao_masquant.models.wrappers import check_in_memory, unwrapped
from torchao_masquant.option_fields import takes_options
from torchao_masquant.options import CalibrationOptions, SolverOptions
from torchao_masquant.recipe import LayerRecipe, Recipe, library_versions
from torchao_masquant.routing import Router
from torchao_masquant.sample_checks import NEEDED, check_samples, no_samples
from torchao_masquant.samples import run_samples
from torchao_masquant.selection import Selected, select
from torchao_masquant.solver.layers import factors_alone
from torchao_masquant.threads import threads_for, widest

__all__ = [
    "calibrate",
    "learned_factors",
]


@takes_options(CalibrationOptions)
def calibrate(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    given: CalibrationOptions,
) -> Recipe:
    """Find how to quantize a multimodal model, from its activations on some data.

    The model is left as it was, also where this raises. Linears and experts that are
    called with a part of a call's tokens, of which nobody says which those are (experts
    of one modality, pruned tokens), are left out, and named in one warning. The maxima that decide the
    smoothing factors and the covariances that whiten the compensation come from one
    run over the data: a covariance of unsmoothed activations gives that of smoothed
    ones (see :class:`~torchao_masquant.statistics.input_statistics.InputStatistics`). Where
    the covariances of all linears do not fit ``max_statistics_bytes``, the data runs
    several times, a part of the linears observed each time.

    Args:
        model: a transformers model whose config names its image, video and audio
            tokens, or any module that is called with keyword inputs.
        samples: the model's own keyword inputs, one dict a call. Padding (zeros in
            ``attention_mask`` [batch, sequence]) is left out. Where ``input_ids`` do
            not tell the modalities, a sample says them itself as ``modality_ids``
            [batch, sequence], integers that index the modalities, base first.
        {options}

    Returns:
        The recipe, on the CPU.

    Raises:
        ValueError: an option is out of range; ``samples`` is empty; a modality has no
            tokens; an activation is nan or inf; a linear is never called; a sample is
            on another device.
        TypeError: an option, a sample or the model is of the wrong type.

    Reference: MASQuant, arXiv 2603.04800, MAS (closed form) and CMC (theorem 2).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"calibrate takes a model, a torch.nn.Module, got a {type(model).__name__}."
        )
    check_samples(samples)
    options, progress = given.options, given.progress
    model = unwrapped(model)
    met = base_first(model, given.base_modality, given.modalities)
    selected = select(model, given.include, given.exclude, options, len(met))
    for name, weight in selected.weights.items():
        check_in_memory(name, weight, model)
        finite = torch.isfinite(weight).flatten(-2).all(-1)
        if not finite.all():
            which = "" if finite.dim() == 0 else f"[{int(finite.int().argmin())}]"
            raise ValueError(f"{name}{which}: its weight holds nan or inf.")
    router = Router.for_model(model, met)
    router.skip_padding = True
    check_request(model, selected, router.modalities, options)
    heads = head_layers(model, options, router.modalities, given.exclude)
    with threads_for(widest(selected.weights.values())):
        iterator = iter(samples)
        first = next(iterator, None)
        if first is None:
            raise no_samples(samples, "samples", NEEDED)
        if options.asymmetric_calibration:
            shown = _again(itertools.chain([first], iterator), samples)
            layers, conductor, count = calibrate_blocks(
                model, shown, selected, router, options, progress=progress
            )
            conductor.tell_left_out(selected)
            return _recipe(
                options, router, selected, {**layers, **heads}, conductor, count
            )
        conductor = Conductor(
            router, options, given.max_statistics_bytes, progress=progress
        )

        def run(data: Iterable[Mapping[str, Any]], what: str = "") -> int:
            with router.attached(model):
                return run_samples(
                    model,
                    data,
                    router,
                    progress=progress and bool(what),
                    description=what,
                )

        passes = conductor.plan(selected, lambda: run([first]))
        foldable: Optional[dict[str, torch.Tensor]] = None
        read = [first]
        if options.procedure.folded:
            shown, read = showing_all(itertools.chain([first], iterator), router)
            foldable = foldable_channels(model, selected.linears, shown, router)
        data: Iterable[Mapping[str, Any]] = itertools.chain(read, iterator)
        if isinstance(samples, Sequence) or len(passes) > 1 or options.epochs:
            data = _again(data, samples)
        factors: Optional[dict[str, torch.Tensor]] = None
        if options.learns_factors:
            session = CalibrationSession(selected.linears, router, second_moments=False)
            with session.watching():
                run(data, "Ranges")
            check_session(session, options)
            factors = learned_factors(model, data, session, options, progress=progress)
        count = 0

        def calibrate_on(number: int) -> None:
            nonlocal count
            of = f" {number}/{len(passes)}" if len(passes) > 1 else ""
            count = run(data, f"Calibrating{of}")

        layers = conductor.layers(
            selected,
            passes,
            calibrate_on,
            factors=factors,
            foldable=foldable,
            is_last=True,
        )
        conductor.tell_left_out(selected)
        if options.epochs and factors is None:
            layers = learn(model, data, layers, router, options, progress=progress)
        return _recipe(options, router, selected, {**layers, **heads}, conductor, count)


def _again(
    data: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The samples, to be read more than once.

    Args:
        data: all of them, of which some may have been read.
        samples: as they were given. A sequence tells a progress bar how long it is.
    """
    return samples if isinstance(samples, Sequence) else list(data)


def _recipe(
    options: SolverOptions,
    router: Router,
    selected: Selected,
    layers: Mapping[str, LayerRecipe],
    conductor: Conductor,
    count: int,
) -> Recipe:
    """Of what was found, in the model's order, with what it was found from."""
    order = [name for name in selected.layers if name in layers]
    return Recipe(
        options=options,
        modalities=router.modalities,
        layers={name: layers[name] for name in [*order, *layers]},
        versions=library_versions(),
        description={"samples": count, "tokens": conductor.tokens},
    )


def learned_factors(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    session: CalibrationSession,
    options: SolverOptions,
    *,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Smoothing factors as the published method learns them.

    Args:
        model: left as it was.
        samples: as for :func:`calibrate`; run through once more.
        session: that has seen them.
        options: that ``learns_factors``.
        progress: show a bar on a terminal.

    Returns:
        Name of each linear to its factors (M, K), or (1, K) of ones.

    Raises:
        ValueError: the decoder is not a stack of blocks, or learning diverges.
    """
    start: dict[str, LayerRecipe] = {}
    for leader, names in session.groups().items():
        weights = {name: session.linears[name].weight for name in names}
        start |= factors_alone(weights, session.statistics[leader], options)
    learned = learn(
        model,
        samples,
        start,
        session.router,
        options,
        progress=progress,
        task=PublishedTask,
    )
    return {name: layer.smoothing_factor for name, layer in learned.items()}
