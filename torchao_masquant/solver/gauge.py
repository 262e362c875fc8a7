# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The overall factor of a modality's smoothing, which quantization leaves free."""

from typing import Iterable, Sequence

import torch

__all__ = ["fitted_gauge", "gauge"]


def gauge(
    weights: Sequence[torch.Tensor],
    shared_weights: Sequence[torch.Tensor],
    smoothing_factor: torch.Tensor,
    covariance: torch.Tensor,
) -> float:
    """The ``g`` for which ``s / g`` makes the shared weight fit a modality best.

    Activations are quantized with a scale of their own per token, so the integers of
    ``Q(x / s)`` are those of ``Q(g x / s)`` for any g > 0, but the weight that a token
    of the modality meets is ``g V`` with ``V = Q(W s_base) / s``. Least squares over
    the linears that share the input, each weighted by the energy of its output::

        min_g sum_i ||(W_i - g V_i) C^1/2||^2 / ||W_i C^1/2||^2

    Args:
        weights: (N_i, K) high-precision weights of the linears that share the input.
        shared_weights: (N_i, K) their dequantized ``Q(W_i * s_base)``.
        smoothing_factor: (K,) the modality's ``s``.
        covariance: (K, K) centred covariance C of the modality's unsmoothed tokens.

    Returns:
        g, positive and finite; 1.0 where the data does not determine one (no
        variation, or weights that do not correlate).
    """

    def terms() -> Iterable[tuple[float, float, float]]:
        for weight, shared in zip(weights, shared_weights):
            weight = weight.double()
            difference = weight - shared.double() / smoothing_factor.double()
            product = difference @ covariance.double()
            yield (
                ((weight @ covariance.double()) * weight).sum().item(),
                (product * weight).sum().item(),
                (product * difference).sum().item(),
            )

    return fitted_gauge(terms())


def fitted_gauge(terms: Iterable[tuple[float, float, float]]) -> float:
    """What :func:`gauge` returns, from sums over the linears' weights.

    Args:
        terms: of each linear ``tr(W C W^T)``, ``tr(D C W^T)`` and ``tr(D C D^T)``, with
            ``D = W - V``.
    """
    numerator = denominator = 0.0
    for energy, crossed, left in terms:
        if energy > 0:
            numerator += (energy - crossed) / energy
            denominator += (energy - 2 * crossed + left) / energy
    if numerator > 0 and denominator > 0:
        return numerator / denominator
    return 1.0
