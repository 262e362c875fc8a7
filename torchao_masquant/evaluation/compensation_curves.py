# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much a low-rank pair can repair, at every rank at once.

For one linear and modality, ``D = W s_m - Q(W s_base)`` is the weight difference and T
the whitening of the covariance of ``x / s_m`` (see
:mod:`torchao_masquant.solver.compensation`). With the singular values sigma of
``T D^T``, the best pair of rank r leaves an output error of the energy ``sum_{i > r}
sigma_i^2`` per token (theorem 2 of arXiv 2603.04800), so that one decomposition gives
the whole curve and the effective rank. The ratio is to the output's variation from
token to token, ``tr(W C W^T)`` with the centred covariance C of x.
"""

from dataclasses import dataclass
from typing import Sequence

import torch

from torchao_masquant.evaluation.analysis import EffectiveRank
from torchao_masquant.evaluation.decibel import decibel
from torchao_masquant.options import Scheme, resolve_rank
from torchao_masquant.solver.compensation import whitening
from torchao_masquant.solver.gauge import gauge
from torchao_masquant.solver.shared_weight import round_to_nearest
from torchao_masquant.statistics.input_statistics import Moments

__all__ = [
    "GAUGED",
    "PUBLISHED",
    "CompensationCurve",
    "compensation_curves",
    "effective_rank",
    "shared_weight",
]

#: Methods whose curves are drawn: without gauge, by the uncentred covariance; and with
#: gauge, by the centred covariance, the mean of the error being left to a bias.
PUBLISHED, GAUGED = "masquant-paper", "masquant"


@dataclass(frozen=True)
class CompensationCurve:
    """Of one linear and modality.

    Attributes:
        rank: of the difference as the published method has it.
        sqnr: method to centred output SQNR at each rank, in dB.
    """

    rank: EffectiveRank
    sqnr: dict[str, list[float]]


def shared_weight(
    weight: torch.Tensor, base_factor: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """(N, K) float32, ``Q(W s_base)`` by round-to-nearest, dequantized."""
    return round_to_nearest(weight, base_factor, scheme).dequantize().float()


def compensation_curves(
    weights: dict[str, torch.Tensor],
    shared_weights: dict[str, torch.Tensor],
    factor: torch.Tensor,
    moments: Moments,
    ranks: Sequence[float],
) -> dict[str, CompensationCurve]:
    """Curves of the linears that share one input, for one modality.

    Args:
        weights: linear to its (N, K) weight.
        shared_weights: linear to its (N, K) dequantized ``Q(W s_base)``.
        factor: (K,) the modality's smoothing factor, without gauge.
        moments: of the modality's tokens at the input, with second moments.
        ranks: shares of ``min(N, K)``.

    Returns:
        Linear to its curves.
    """
    centered = moments.covariance(True)
    g = gauge(list(weights.values()), list(shared_weights.values()), factor, centered)
    factors = {PUBLISHED: factor, GAUGED: factor / g}
    transforms = {
        PUBLISHED: _whitening_of(moments.covariance(False), factors[PUBLISHED]),
        GAUGED: _whitening_of(centered, factors[GAUGED]),
    }
    curves = {}
    for name, weight in weights.items():
        weight = weight.double()
        signal = ((weight @ centered) * weight).sum().item()
        sqnr = {}
        spectra = {}
        for method, s in factors.items():
            difference = weight * s - shared_weights[name].double()
            spectra[method] = torch.linalg.svdvals(transforms[method] @ difference.t())
            energies = spectra[method].square()
            sqnr[method] = [
                decibel(signal, energies[resolve_rank(rank, *weight.shape) :].sum())
                for rank in ranks
            ]
        difference = weight * factor - shared_weights[name].double()
        curves[name] = CompensationCurve(
            EffectiveRank(
                plain=effective_rank(torch.linalg.svdvals(difference)),
                whitened=effective_rank(spectra[PUBLISHED]),
                full=min(weight.shape),
            ),
            sqnr,
        )
    return curves


def _whitening_of(covariance: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """T of the covariance of ``x / factor``."""
    return whitening(covariance / torch.outer(factor, factor))[0]


def effective_rank(singular_values: torch.Tensor) -> float:
    """``exp(-sum p_i log p_i)`` with ``p_i = sigma_i^2 / sum_j sigma_j^2``.

    The entropy of Roy and Vetterli's effective rank (EUSIPCO 2007), taken of the
    squared singular values: of the share of the energy in each direction. MASQuant's
    authors take it of the singular values themselves, which gives larger numbers.

    Args:
        singular_values: (J,) non-negative.

    Returns:
        1 for a matrix of rank one, J for equal singular values, 0 for a zero matrix.
    """
    energies = singular_values.double().square()
    total = energies.sum()
    if not total > 0:
        return 0.0
    return torch.special.entr(energies / total).sum().exp().item()
