# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is solved for: the method and its options."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Union

from torchao_masquant.schemes import Scheme, get_scheme

__all__ = [
    "ALPHAS",
    "AUTO",
    "METHODS",
    "Method",
    "SEPARATIONS",
    "SolverOptions",
]

#: Value of ``alpha`` and ``rank`` that leaves the choice to the solver.
AUTO = "auto"

#: What ``alpha="auto"`` chooses from, for each input.
ALPHAS = (0.3, 0.5, 0.7)

#: What ``separation="auto"`` chooses from, for each input.
SEPARATIONS = (1.0, 0.5, 0.0)

# Larger blocks spread outliers no better, and take longer to rotate.
_LARGEST_BLOCK = 512

_ROUNDINGS = ("gptq", "nearest")

# What the linear behind an MLP's activation is called.
_DOWN = ("down_proj", "fc2", "w2")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
        shift: take each modality's mean off its activations before they are rounded;
            its product with the weight joins the modality's bias.
        rounding: of the shared weight, "gptq" (for all modalities jointly, see
            :func:`solver.shared_weight.round_jointly`) or "nearest".
        clip: make the weight's scales for a part of its range, where that leaves a
            smaller error.
        rank_floor: the least that a share of ``min(N, K)`` stands for as a rank, where
            the weight has so many.
        rotation: rotate channels in blocks by Hadamard matrices before they are rounded.
        spares_down: the linear behind an MLP's activation (``down_proj``, ``fc2``,
            ``w2``) is rounded as it is, without factor and pair.
        lr: of learning, where none is given.
    """

    smooth: bool
    per_modality: bool = False
    gauge: bool = False
    centered: bool = False
    shift: bool = False
    rounding: str = "nearest"
    clip: bool = False
    rank_floor: int = 0
    rotation: bool = False
    spares_down: bool = False
    lr: float = 3e-4


METHODS = {
    "masquant": Method(
        smooth=True,
        per_modality=True,
        gauge=True,
        centered=True,
        shift=True,
        rounding="gptq",
        clip=True,
        rotation=True,
    ),
    # As in arXiv 2603.04800, sections on MAS and CMC, and its authors' code.
    "masquant-paper": Method(
        smooth=True, per_modality=True, rank_floor=32, spares_down=True, lr=5e-2
    ),
    "smoothquant": Method(smooth=True),
    "rtn": Method(smooth=False),
}


@dataclass(frozen=True)
class SolverOptions:
    """Options of a solution; checked when made.

    Attributes:
        scheme: name of a scheme in :data:`torchao_masquant.SCHEMES`.
        method: a key of :data:`METHODS`.
        alpha: 0..1, exponent of the activations in the smoothing factor; "auto": for
            each input that of :data:`ALPHAS` whose solution hears and sees best on
            sampled tokens. None: 0.5.
        separation: 0..1, how far the sizes of channels that a modality's factor is made
            for go from those of all tokens (0) to the modality's own (1), geometrically;
            "auto": for each input that of :data:`SEPARATIONS` that is best on sampled
            tokens. None: 0 for method "masquant", 1 for the others.
        rank: of each modality's pair, an absolute int or a share (float) of
            ``min(N, K)``; "auto": the bytes of a share of 0.05, spent where they
            gain most.
        group_size: of the weight, in place of the scheme's.
        shift: None for what the method does, as below.
        rounding: "gptq" or "nearest".
        clip: see :class:`Method`.
        low_rank_bits: 16 or 8, of the low-rank pairs.
        modality_weights: name to a factor of what a modality's errors weigh, 1 for
            those left out. For "gptq" and "clip" it multiplies the weight of each of the
            modality's tokens, so that a modality counts for as many tokens as it has; for
            "auto" and learning that of the modality's mean.
        epochs: of learning (:mod:`torchao_masquant.learning`) after the closed form;
            zero for none.
            For method "masquant-paper" it is that of the smoothing factors, before
            pairs are solved for, as its authors have it (with two epochs).
        lr: its learning rate, relative to the size of what is learned ("masquant-paper":
            of the factors as they are). None: that of the method.
        batch_size: samples whose mean gradient makes one of its steps.
        hadamard_size: neighbouring channels that are rotated together before they are
            rounded (:mod:`torchao_masquant.kernels.hadamard`), a power of two that
            divides the input width K of every linear; 1: none are. None: for method
            "masquant" the largest such power of each K, of 512 at most; none for the
            others.

    Raises:
        ValueError: an unknown scheme or method, an option that is out of range or that
            the method does not have.
        TypeError: an option is of another type than those above.
    """

    scheme: str = "w4a8"
    method: str = "masquant"
    alpha: Union[float, str, None] = None
    separation: Union[float, str, None] = None
    rank: Union[int, float, str] = 0.05
    group_size: Optional[int] = None
    shift: Optional[bool] = None
    rounding: Optional[str] = None
    clip: Optional[bool] = None
    low_rank_bits: int = 16
    modality_weights: Optional[Mapping[str, float]] = None
    epochs: int = 0
    lr: Optional[float] = None
    batch_size: int = 1
    hadamard_size: Optional[int] = None

    def __post_init__(self) -> None:
        # Files and reports compare it: as SCHEMES has it, however it was written.
        object.__setattr__(self, "scheme", get_scheme(self.scheme).name)
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}."
            )
        if self.lr is None:
            object.__setattr__(self, "lr", METHODS[self.method].lr)
        for name in ("alpha", "separation"):
            self._check_share(name, getattr(self, name))
        if self.rank != AUTO:
            # The command line names methods without importing torch.
            from torchao_masquant.solver.compensation import resolve_rank

            resolve_rank(self.rank, 1, 1)  # type: ignore[arg-type]
        if self.group_size is not None:
            if type(self.group_size) is not int:
                raise TypeError(f"group_size must be an int, got {self.group_size!r}.")
            if self.group_size < 2:
                raise ValueError(
                    f"group_size must be at least 2, got {self.group_size}."
                )
        for name in ("shift", "clip"):
            if not isinstance(value := getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name} must be True, False or None, got {value!r}.")
        if self.rounding not in (None, *_ROUNDINGS):
            raise ValueError(
                f"unknown rounding {self.rounding!r}: choose one of {_ROUNDINGS}."
            )
        if type(self.low_rank_bits) is not int or self.low_rank_bits not in (8, 16):
            raise ValueError(
                f"low_rank_bits must be 8 or 16, got {self.low_rank_bits!r}."
            )
        if not isinstance(self.modality_weights, (Mapping, type(None))):
            raise TypeError(
                "modality_weights must be a dict of names and numbers, got "
                f"{self.modality_weights!r}."
            )
        for name, weight in (self.modality_weights or {}).items():
            if not isinstance(name, str) or not _is_number(weight):
                raise TypeError(
                    "modality_weights must be a dict of names and numbers, got "
                    f"{name!r}: {weight!r}."
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"modality_weights of {name!r} must be finite and not negative, got "
                    f"{weight}."
                )
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int):
            raise TypeError(f"epochs must be an int, got {self.epochs!r}.")
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}.")
        if not isinstance(self.lr, (int, float)) or isinstance(self.lr, bool):
            raise TypeError(f"lr must be a number, got {self.lr!r}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be positive and finite, got {self.lr}.")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise TypeError(f"batch_size must be an int, got {self.batch_size!r}.")
        if self.batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1 sample, got {self.batch_size}."
            )
        if self.hadamard_size is not None:
            self._check_rotation(self.hadamard_size)
        if not METHODS[self.method].centered and (
            self.shift
            or self.clip
            or self.rounding == "gptq"
            or self.hadamard_size not in (None, 1)
            or AUTO in (self.alpha, self.rank, self.separation)
        ):
            raise ValueError(
                f"method {self.method!r} is kept as it was published: shift, gptq, "
                "clip, rotations and auto are for method 'masquant'."
            )
        if self.epochs and not METHODS[self.method].per_modality:
            raise ValueError(
                f"method {self.method!r} is kept as it was published: learning is for "
                "methods 'masquant' and 'masquant-paper'."
            )

    @staticmethod
    def _check_share(name: str, value: Union[float, str, None]) -> None:
        if value is None or value == AUTO:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or 'auto', got {value!r}.")
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}.")

    @staticmethod
    def _check_rotation(size: object) -> None:
        if type(size) is not int:
            raise TypeError(f"hadamard_size must be an int or None, got {size!r}.")
        if size < 1 or size & (size - 1):
            raise ValueError(
                "hadamard_size must be a power of two, or 1 for no rotation, got "
                f"{size}."
            )

    def stored(self) -> dict[str, Any]:
        """As files hold them, for ``SolverOptions(**stored)``.

        Without a batch size of 1 and a rotation that is left to the method: earlier files
        have none, readers of those refuse a name that they do not know, and an
        interrupted run goes on.
        """
        found = dict(vars(self))
        for name in ("batch_size", "hadamard_size"):
            if found[name] == getattr(type(self), name):
                del found[name]
        return found

    @property
    def alphas(self) -> tuple[float, ...]:
        """Exponents to choose from."""
        return self._choice(0.5 if self.alpha is None else self.alpha, ALPHAS)

    @property
    def separations(self) -> tuple[float, ...]:
        """Separations to choose from."""
        given = self.separation
        if given is None:
            given = 0.0 if METHODS[self.method].centered else 1.0
        return self._choice(given, SEPARATIONS)

    @staticmethod
    def _choice(given: Union[float, str], auto: tuple[float, ...]) -> tuple[float, ...]:
        return auto if isinstance(given, str) else (float(given),)

    @property
    def learning_rate(self) -> float:
        """What ``lr`` is where None was given, too."""
        assert self.lr is not None
        return self.lr

    @property
    def learns_factors(self) -> bool:
        """Whether smoothing factors are learned before the rest is solved for."""
        return self.epochs > 0 and not METHODS[self.method].centered

    def spares(self, name: str) -> bool:
        """Whether a linear, or a projection of experts, has no factor and no pair."""
        last = name.rpartition(".")[2].partition("[")[0]
        return METHODS[self.method].spares_down and last in _DOWN

    def rank_of(self, share: Union[int, float], n: int, k: int) -> int:
        """Of the pair of an (N, K) weight: see :func:`resolve_rank`.

        Args:
            share: a rank, or a share of ``min(N, K)``, of which the method's least rank
                is made at least.
        """
        from torchao_masquant.solver.compensation import resolve_rank

        rank = resolve_rank(share, n, k)
        if rank and isinstance(share, float):
            rank = max(rank, METHODS[self.method].rank_floor)
        return min(rank, n, k)

    @property
    def uniform_rank(self) -> Union[int, float]:
        """The rank where it is the same rule for all linears."""
        assert not isinstance(self.rank, str)
        return self.rank

    def hadamard_size_of(self, in_features: int) -> Optional[int]:
        """Of the rotation of an input's channels; None for none.

        Args:
            in_features: K, which a size that was asked for divides
                (:func:`~torchao_masquant.calibration.request.check_shapes`).
        """
        if self.hadamard_size is not None:
            return self.hadamard_size if self.hadamard_size > 1 else None
        if not METHODS[self.method].rotation:
            return None
        size = min(in_features & -in_features, _LARGEST_BLOCK)
        return size if size > 1 else None

    @property
    def bits(self) -> Scheme:
        scheme = get_scheme(self.scheme)
        if self.group_size is None:
            return scheme
        return dataclasses.replace(scheme, group_size=self.group_size)

    @property
    def parts(self) -> Method:
        method = METHODS[self.method]
        given = {
            name: value
            for name in ("shift", "rounding", "clip")
            if (value := getattr(self, name)) is not None
        }
        if self.bits.weight_only:
            # Nothing to round: a shift would change nothing.
            given["shift"] = False
        return dataclasses.replace(method, **given)

    def weights_of(self, modalities: Sequence[str]) -> list[float]:
        """What the error of each modality weighs, base first."""
        given = self.modality_weights or {}
        return [float(given.get(name, 1.0)) for name in modalities]
