# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is solved for: the method and its options."""

from dataclasses import dataclass
from typing import Union

from torchao_masquant.schemes import Scheme, get_scheme
from torchao_masquant.solver.compensation import resolve_rank

__all__ = ["METHODS", "Method", "SolverOptions"]


@dataclass(frozen=True)
class Method:
    """Parts that make up a way to quantize.

    Attributes:
        smooth: divide activations by a smoothing factor at all.
        per_modality: one smoothing factor per modality (MAS) and a low-rank pair for
            each but the base (CMC), instead of one factor for all tokens.
        gauge: fit each modality's overall factor (:func:`solver.gauge.gauge`).
        centered: whiten by the centred covariance and let a bias per modality take
            the mean of what the pair leaves.
    """

    smooth: bool
    per_modality: bool = False
    gauge: bool = False
    centered: bool = False


METHODS = {
    "masquant": Method(smooth=True, per_modality=True, gauge=True, centered=True),
    # As in arXiv 2603.04800, sections on MAS (closed form) and CMC.
    "masquant-paper": Method(smooth=True, per_modality=True),
    "smoothquant": Method(smooth=True),
    "rtn": Method(smooth=False),
}


@dataclass(frozen=True)
class SolverOptions:
    """Options of a solution; checked when made.

    Attributes:
        scheme: name of a scheme in :data:`torchao_masquant.SCHEMES`.
        method: a key of :data:`METHODS`.
        alpha: 0..1, exponent of the activations in the smoothing factor.
        rank: of each modality's pair, an absolute int or a share (float) of
            ``min(N, K)``.

    Raises:
        ValueError: an unknown scheme or method, alpha outside 0..1, a negative rank or
            a share above 1.
        TypeError: alpha or rank is no number.
    """

    scheme: str = "w4a8"
    method: str = "masquant"
    alpha: float = 0.5
    rank: Union[int, float] = 0.05

    def __post_init__(self) -> None:
        get_scheme(self.scheme)
        if self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}."
            )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"alpha must be a number, got {self.alpha!r}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, got {self.alpha}.")
        resolve_rank(self.rank, 1, 1)

    @property
    def bits(self) -> Scheme:
        return get_scheme(self.scheme)

    @property
    def parts(self) -> Method:
        return METHODS[self.method]
