# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``analyze``: what a dense model's modalities mean for quantizing it."""

import itertools
import statistics
from functools import partial
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.calibration.left_out import warn_of_left_out
from torchao_masquant.calibration.passes import Passes
from torchao_masquant.calibration.request import base_first
from torchao_masquant.evaluation.analysis import Analysis
from torchao_masquant.evaluation.compensation_curves import GAUGED, PUBLISHED
from torchao_masquant.evaluation.input_study import InputStudy, study_input
from torchao_masquant.evaluation.token_session import TokenSession
from torchao_masquant.modality import TEXT
from torchao_masquant.models.wrappers import unwrapped
from torchao_masquant.option_values import Amount
from torchao_masquant.options import MAX_STATISTICS_BYTES, NamePatterns, get_scheme
from torchao_masquant.progress import progress_bar
from torchao_masquant.routing import Router
from torchao_masquant.sample_checks import check_samples, no_samples
from torchao_masquant.samples import run_samples
from torchao_masquant.selection import Selected, select_linears
from torchao_masquant.threads import threads_for, widest

__all__ = ["analyze"]

#: tokens of each modality and input that are quantized to measure the loss
_TOKENS = 512
_RANKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def analyze(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    *,
    scheme: str = "w4a8",
    alpha: float = 0.5,
    ranks: Sequence[float] = _RANKS,
    modalities: Optional[Sequence[str]] = None,
    include: NamePatterns = None,
    exclude: NamePatterns = None,
    max_statistics_bytes: int = MAX_STATISTICS_BYTES,
    progress: bool = True,
) -> Analysis:
    """Find how the modalities differ at each linear, and what that costs.

    The model is left as it was. The data runs once, or several times where the
    covariances of all linears do not fit ``max_statistics_bytes``.

    Args:
        model: dense; see :func:`~torchao_masquant.calibrate`.
        samples: the model's own keyword inputs, as for ``calibrate``.
        scheme: whose bits to analyze for; see :data:`torchao_masquant.SCHEMES`. With
            16-bit activations there is no loss of activations to measure.
        alpha: 0..1, exponent of the activations in the smoothing factors.
        ranks: of the low-rank pairs, shares of ``min(N, K)``, 0.0 to 1.0.
        modalities: names, base first; None for all that the model's config declares.
        include: patterns of names of linears, in place of all of the decoder.
        exclude: patterns of names to leave out.
        max_statistics_bytes: bound of the statistics' memory, in bytes.
        progress: show bars on a terminal.

    Returns:
        The analysis.

    Raises:
        ValueError: an option is out of range; ``samples`` is empty; a modality has no
            tokens; an activation or a weight is nan or inf; a linear is never called,
            or quantized already.
        TypeError: an option or a sample is of the wrong type.

    Reference: MASQuant, arXiv 2603.04800, theorems 1 and 2.
    """
    check_samples(samples)
    Amount("of bytes").check("max_statistics_bytes", max_statistics_bytes)
    bits = get_scheme(scheme)
    _check_alpha(alpha)
    shares = _checked_shares(ranks)
    model = unwrapped(model)
    linears = select_linears(model, include, exclude)
    for name, linear in linears.items():
        if linear.weight.is_meta or not torch.isfinite(linear.weight).all():
            raise ValueError(
                f"{name}: its weight holds no values, nan or inf: load the model's "
                "weights first, or exclude it."
            )
    base = TEXT if modalities is None else next(iter(modalities), TEXT)
    router = Router.for_model(model, base_first(model, base, modalities))
    router.skip_padding = True

    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        raise no_samples(
            samples,
            "samples",
            "the analysis needs at least one sample of every modality",
        )
    with threads_for(widest(linear.weight for linear in linears.values())):
        passes = _TokenPasses(router, True, max_statistics_bytes)
        everything = Selected(linears, {})

        def run(data: Iterable[Mapping[str, Any]], what: str = "") -> None:
            with router.attached(model):
                run_samples(
                    model,
                    data,
                    router,
                    progress=progress and bool(what),
                    description=what,
                )

        plan = passes.plan(everything, lambda: run([first]))
        data: Iterable[Mapping[str, Any]] = itertools.chain([first], iterator)
        if len(plan) > 1:
            data = list(data)
        studies: dict[str, InputStudy] = {}
        for index, names in enumerate(plan, start=1):
            of = f" {index}/{len(plan)}" if len(plan) > 1 else ""
            session = passes.observe(
                everything.where(names.__contains__),
                partial(run, data, f"Observing{of}"),
            )
            session.check_complete()
            passes.left_out.update(session.not_matched)
            bar = progress_bar(
                session.groups().items(),
                desc=f"Analyzing{of}",
                show=progress,
            )
            for leader, members in bar:
                studies[leader] = study_input(
                    session, leader, members, bits, alpha, shares
                )

    warn_of_left_out([name for name in linears if name in passes.left_out])
    others = router.modalities[1:]
    curves = {
        name: {m: study.curves[m][name] for m in others}
        for study in studies.values()
        for name in study.input.linears
    }
    return Analysis(
        model=type(model).__name__,
        scheme=scheme,
        alpha=float(alpha),
        modalities=router.modalities,
        inputs={name: studies[name].input for name in linears if name in studies},
        effective_ranks={
            name: {m: curves[name][m].rank for m in others} for name in curves
        },
        ranks=shares,
        sqnr_by_rank={
            method: {
                m: tuple(
                    statistics.mean(curves[name][m].sqnr[method][i] for name in curves)
                    for i in range(len(shares))
                )
                for m in others
            }
            for method in (PUBLISHED, GAUGED)
        },
    )


class _TokenPasses(Passes):
    """Keeps tokens of each input, too."""

    def new_session(self, part: Selected) -> TokenSession:
        return TokenSession(dict(part.linears), self.router, _TOKENS)

    def observe(self, part: Selected, run: Callable[[], object]) -> TokenSession:
        session = super().observe(part, run)
        assert isinstance(session, TokenSession)
        return session


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a number, got {alpha!r}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1, got {alpha}.")


def _checked_shares(ranks: Any) -> tuple[float, ...]:
    """Shares of ``min(N, K)``, ascending, each once."""
    if isinstance(ranks, (str, int, float)) or not ranks:
        raise ValueError(
            f"ranks is a sequence of shares of min(N, K) such as (0.0, 0.05), got "
            f"{ranks!r}."
        )
    for rank in ranks:
        # 1 could mean a rank of one, or all of it.
        if rank != 0 and not isinstance(rank, float) or not 0 <= rank <= 1:
            raise ValueError(
                f"ranks are shares of min(N, K), of type float and in 0..1, got "
                f"{rank!r}."
            )
    return tuple(sorted({float(rank) for rank in ranks}))
