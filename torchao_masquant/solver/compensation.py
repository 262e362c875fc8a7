# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Cross-modal compensation: the best low-rank pair for a weight difference."""

from typing import Optional

import torch

from torchao_masquant.threads import threads_for

__all__ = [
    "balanced",
    "error_spectrum",
    "low_rank_pair",
    "pair_of_product",
    "whitening",
]

# Eigenvalues below this part of the largest are rounding noise of a float64
# covariance: it has rank min(T, K), and eigh returns its zeros as +-1e-16 relative.
_NUMERICAL_RANGE = 1e-10


def whitening(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """T with ``T^T T = C``, and an R with ``T R = I``.

    With ``C = D U S U^T D``, D the standard deviations of the channels, these are
    ``T = S^1/2 U^T D`` and ``R = D^-1 U S^-1/2``. D makes the
    channels' own sizes no matter.

    Both on the numerical range of the correlations alone: directions in which no token
    varied weigh nothing, and inverting their eigenvalues would blow rounding noise up.

    Args:
        covariance: (K, K), symmetric positive semi-definite up to rounding.

    Returns:
        T (J, K) and R (K, J), float64; J is the numerical rank, 0 for a covariance of
        zeros.
    """
    covariance = covariance.double()
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    with threads_for(len(covariance)):
        eigenvalues, vectors = torch.linalg.eigh(
            covariance / torch.outer(deviation, deviation)
        )
    keep = eigenvalues > _NUMERICAL_RANGE * eigenvalues[-1].clamp_min(0)
    root = eigenvalues[keep].sqrt()
    vectors = vectors[:, keep]
    return (vectors * root).t() * deviation, vectors / root / deviation[:, None]


def error_spectrum(
    difference: torch.Tensor,
    covariance: torch.Tensor,
    whitened: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
) -> torch.Tensor:
    """What each component of a pair would take off ``E ||x D^T||^2``, largest first.

    The squared singular values of ``C^1/2 D^T``; see :func:`low_rank_pair` for the
    arguments.

    Returns:
        (min(N, J),) float64, non-negative.
    """
    return _components(difference.double(), covariance, whitened, 0)[0]


def low_rank_pair(
    difference: torch.Tensor,
    rank: int,
    covariance: torch.Tensor,
    whitened: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    """L1, L2 that minimise ``tr((D - (L1 L2)^T) C (D - (L1 L2)^T)^T)`` at a given rank.

    Theorem 2 of arXiv 2603.04800: for any whitening ``T^T T = C``, ``T R = I``, with the
    SVD ``T D^T = P Sig V^T`` cut to rank r, ``L1 = R P_r`` and ``L2 = Sig_r V_r^T``.
    Where the weight has no more outputs than inputs the same product follows without
    inverting anything: ``L2 = V_r^T``, the principal components of the error of the
    output (eigenvectors of ``D C D^T``), and ``L1 = D^T V_r``. So no decomposition is
    ever larger than ``min(N, K)``, and directions that no token used cannot blow up.

    Each column of L1 and row of L2 are then scaled against each other to equal norm,
    which changes nothing in their product and keeps both in the range of 16-bit types.

    Args:
        difference: (N, K) the weight difference D to make up for.
        rank: r; cut down to the numerical rank of what there is to make up for.
        covariance: (K, K) C, of the tokens that will meet the pair.
        whitened: its :func:`whitening`, looked at where N > K; None: found here.

    Returns:
        L1 (K, r) and L2 (r, N), float64; None where the rank comes out as zero.

    Raises:
        RuntimeError: the result is not finite.
    """
    _, l1, l2 = _components(difference.double(), covariance, whitened, rank)
    return balanced(l1, l2) if l1.shape[1] else None


def pair_of_product(
    difference: torch.Tensor, rank: int, product: torch.Tensor
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`low_rank_pair` of a weight with no more outputs than inputs.

    Args:
        difference: (N, K) float64 D, N <= K.
        rank: r.
        product: (N, K) float64 ``D C``.
    """
    _, l1, l2 = _principal(difference, product, rank)
    return balanced(l1, l2) if l1.shape[1] else None


def balanced(l1: torch.Tensor, l2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product of L1 (K, r) and L2 (r, N), with halves of the same norm.

    Raises:
        RuntimeError: the result is not finite.
    """
    down, up = l1.norm(dim=0), l2.norm(dim=1)
    # A norm of zero leaves nothing to balance.
    balance = torch.where((down > 0) & (up > 0), (up / down).sqrt(), 1.0)
    l1, l2 = l1 * balance, l2 / balance[:, None]
    if not (torch.isfinite(l1).all() and torch.isfinite(l2).all()):
        raise RuntimeError(
            "the low-rank pair is not finite, although its covariance and weight "
            f"difference of shape {(l2.shape[1], l1.shape[0])} are: this is a bug."
        )
    return l1, l2


def _components(
    difference: torch.Tensor,
    covariance: torch.Tensor,
    whitened: Optional[tuple[torch.Tensor, torch.Tensor]],
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All energies, largest first, and of the first components, ``rank`` at most that
    have one, the down-projections (K, r) and up-projections (r, N)."""
    n, k = difference.shape
    if n <= k:
        return _principal(difference, difference @ covariance.double(), rank)
    transform, inverse = whitening(covariance) if whitened is None else whitened
    aim = transform @ difference.t()
    values, basis = _eigen(aim @ aim.t())
    basis = basis[:, : _count(values, rank)]
    return values, inverse @ basis, basis.t() @ aim


def _principal(
    difference: torch.Tensor, product: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`_components` from ``D C``, where N <= K."""
    values, basis = _eigen(product @ difference.t())
    basis = basis[:, : _count(values, rank)]
    return values, difference.t() @ basis, basis.t()


def _count(values: torch.Tensor, rank: int) -> int:
    return min(rank, int((values > 0).sum()))


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first, those within rounding noise as zeros, and vectors."""
    if gram.shape[0] == 0:
        return gram.new_zeros(0), gram
    with threads_for(len(gram)):
        values, vectors = torch.linalg.eigh((gram + gram.t()) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = gram.shape[0] * torch.finfo(gram.dtype).eps * values[0].clamp_min(0)
    return torch.where(values > noise, values, 0.0), vectors
