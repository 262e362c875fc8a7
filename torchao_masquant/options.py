# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is asked for: number formats, methods, and the options of a calibration."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Union

from torchao_masquant.modality import TEXT
from torchao_masquant.option_fields import (
    check_options,
    option,
    option_of,
    shows_options,
)
from torchao_masquant.option_values import (
    AUTO,
    Amount,
    Bits,
    Flag,
    Names,
    NoFlag,
    OneOf,
    Patterns,
    PowerOfTwo,
    Rank,
    Share,
    Switch,
    Values,
    Weights,
    Whole,
)

__all__ = [
    "ALPHAS",
    "AUTO_SHARE",
    "FAST",
    "MAX_STATISTICS_BYTES",
    "METHODS",
    "SCHEMES",
    "SEPARATIONS",
    "CalibrationOptions",
    "Method",
    "NamePatterns",
    "QuantizationOptions",
    "Scheme",
    "STOCK",
    "SolverOptions",
    "get_scheme",
    "largest_rotation",
    "resolve_rank",
    "scheme_of_numbers",
]

#: Each input gets one of these where ``alpha="auto"``.
ALPHAS = (0.3, 0.5, 0.7)

#: ``rank="auto"`` spends the bytes of a rank that is this share of ``min(N, K)`` everywhere.
AUTO_SHARE = 0.05

#: Each input gets one of these where ``separation="auto"``.
SEPARATIONS = (1.0, 0.5, 0.0)

#: Value of ``effort`` for a first result.
FAST = "fast"

#: Value of ``target`` for engines that know neither modalities nor our operators.
STOCK = "compressed-tensors"

#: The statistics of one pass take no more, unless something else is asked for.
MAX_STATISTICS_BYTES = 4 << 30

#: Patterns of names of linears and expert weights, shell-style or "re:...".
NamePatterns = Optional[Union[str, Sequence[str]]]

# Larger blocks spread outliers no better, and take longer to rotate.
_LARGEST_BLOCK = 512

# Schemes that such an engine has.
_STOCK_SCHEMES = ("w8a8", "w4a16")

# Names that models give the linear behind an MLP's activation.
_DOWN = ("down_proj", "fc2", "w2")


@dataclass(frozen=True)
class Scheme:
    """Number formats of a quantized linear.

    Attributes:
        name: as users write it.
        weight_bits: 8, 4 or 3. 3-bit integers are held in the storage of 4-bit ones:
            they show what 3 bits cost in accuracy, and save neither memory nor time
            over 4.
        act_bits: 2 to 8, symmetric, one scale per token, found at run time; fewer than
            8 bits are held in int8. 16: activations are not quantized.
        group_size: neighbours of an output channel that share one weight scale; None
            for one scale per output channel.
        symmetric: False for weights with a zero point per scale, which only
            activations that are not quantized can meet.
        weight_format: of weights that are no integers, a name in
            :data:`~torchao_masquant.kernels.number_formats.FORMATS`.
        act_format: of activations that are no integers, likewise.
    """

    name: str
    weight_bits: int
    act_bits: int
    group_size: Optional[int] = None
    symmetric: bool = True
    weight_format: Optional[str] = None
    act_format: Optional[str] = None

    @property
    def floats(self) -> bool:
        """Whether activations are rounded to floats."""
        return self.act_format is not None

    @property
    def has_own_groups(self) -> bool:
        """Whether its number formats leave no choice of a group size."""
        return self.weight_format is not None and self.group_size is not None

    @property
    def weight_only(self) -> bool:
        """Whether activations stay as they are."""
        return self.act_bits == 16


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", 8, 8),
        Scheme("w4a8", 4, 8),
        Scheme("w4a6", 4, 6),
        Scheme("w4a4", 4, 4),
        # Simulated: see Scheme.weight_bits.
        Scheme("w3a3", 3, 3),
        Scheme("w4a16", 4, 16, group_size=128, symmetric=False),
        # Bits and groups are those of the formats, which torch is needed to read.
        Scheme("fp8", 8, 8, None, True, "e4m3", "e4m3"),
        Scheme("fp8-block", 8, 8, 128, True, "e4m3-128", "e4m3-128"),
        Scheme("w4a8-fp8", 4, 8, None, True, None, "e4m3"),
        Scheme("nvfp4", 4, 4, 16, True, "nvfp4", "nvfp4"),
        Scheme("mxfp4", 4, 4, 32, True, "mxfp4", "mxfp4"),
        Scheme("mxfp8", 8, 8, 32, True, "mxfp8", "mxfp8"),
    )
}


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name, in small or capital letters: "w4a8" or "W4A8".

    Raises:
        ValueError: there is no such scheme.
    """
    scheme = SCHEMES.get(name.lower()) if isinstance(name, str) else None
    if scheme is None:
        raise ValueError(
            f"unknown scheme {name!r}: choose one of {', '.join(SCHEMES)}."
        )
    return scheme


def scheme_of_numbers(
    weight_bits: int,
    act_bits: int,
    weight_format: Optional[str] = None,
    act_format: Optional[str] = None,
) -> str:
    """What to call the numbers of a weight and its activations: "w4a8", "nvfp4".

    Args:
        weight_bits: see :class:`Scheme`, as all below.
    """
    if act_format is None:
        return f"w{weight_bits}a{act_bits}"
    formats = weight_format, act_format
    return next(
        (
            s.name
            for s in SCHEMES.values()
            if (s.weight_format, s.act_format) == formats
        ),
        f"{weight_format or f'int{weight_bits}'} by {act_format}",
    )


@dataclass(frozen=True)
class Method:
    """Parts that make up a way to quantize.

    Attributes:
        title: its name in a sentence.
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
        folded: one factor for all modalities, which a module before the linears takes
            into its weight; nothing else is done to an input.
        spares_down: the linear behind an MLP's activation (``down_proj``, ``fc2``,
            ``w2``) is rounded as it is, without factor and pair.
        lr: of learning, where none is given.
    """

    title: str
    smooth: bool
    per_modality: bool = False
    gauge: bool = False
    centered: bool = False
    shift: bool = False
    rounding: str = "nearest"
    clip: bool = False
    rank_floor: int = 0
    rotation: bool = False
    folded: bool = False
    spares_down: bool = False
    lr: float = 3e-4

    @property
    def tells_apart(self) -> bool:
        """Whether modalities are told apart where the model runs, not in solving alone."""
        return self.per_modality and not self.folded


METHODS = {
    "masquant": Method(
        "MASQuant",
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
        "MASQuant, as published",
        smooth=True,
        per_modality=True,
        rank_floor=32,
        spares_down=True,
        lr=5e-2,
    ),
    "smoothquant": Method("SmoothQuant", smooth=True),
    "rtn": Method("round-to-nearest", smooth=False),
}


def resolve_rank(rank: Union[int, float], n: int, k: int) -> int:
    """Rank of the pair of an (N, K) weight.

    Args:
        rank: an int is the rank itself, a float the share of ``min(n, k)`` (at least
            one where it is above zero).

    Raises:
        ValueError: ``rank`` is negative, or a share above 1.
        TypeError: ``rank`` is no number.
    """
    if rank == AUTO:
        raise TypeError(f"rank must be an int or a float, got {rank!r}.")
    Rank().check("rank", rank)
    full = min(n, k)
    if isinstance(rank, int):
        return min(rank, full)
    return max(1, round(rank * full)) if rank > 0 else 0


def largest_rotation(in_features: int) -> Optional[int]:
    """Block of the rotation of an input of K channels; None where K is odd.

    Args:
        in_features: K.
    """
    size = min(in_features & -in_features, _LARGEST_BLOCK)
    return size if size > 1 else None


class _SchemeName(Values):
    """Names of schemes, in small or capital letters."""

    choices = tuple(SCHEMES)

    def check(self, name: str, value: Any) -> None:
        get_scheme(value)

    def read(self, text: str) -> str:
        return text.lower()


@shows_options
@dataclass
class SolverOptions:
    """Options of a solution, as a recipe holds them; checked when made.

    Attributes:
        {options}

    Raises:
        ValueError: an unknown scheme or method, an option that is out of range or that
            the method does not have.
        TypeError: an option is of another type than those above.
    """

    scheme: str = option(
        "w4a8",
        "bits of weights and activations",
        _SchemeName(),
        f'One of {", ".join(SCHEMES)}; "w4a16" quantizes weights alone, and "w3a3" is '
        "simulated; those behind it round both sides to floats.",
        first=True,
    )
    method: str = option(
        "masquant",
        "masquant; masquant-paper, as published; smoothquant, one factor for all "
        "tokens; rtn, round-to-nearest",
        OneOf(tuple(METHODS)),
        '"masquant-paper" has no shift, gauge, modality bias, joint rounding and '
        "rotation; its ranks are 32 at least, ``down_proj`` is only rounded, and factors "
        "are learned where ``epochs`` says so.",
        first=True,
    )
    alpha: Union[float, str, None] = option(
        None,
        "exponent of the activations in the smoothing factor, 0..1, or auto, which takes "
        "for each input the best of three on sampled tokens; 0.5 where it is not given",
        Share(),
    )
    separation: Union[float, str, None] = option(
        None,
        "how far a modality's factor goes from that of all tokens, 0..1, or auto, as "
        "above; where it is not given 0 for masquant, 1 for masquant-paper",
        Share(),
        "A factor is made for the sizes of channels over all tokens (0: as in "
        "SmoothQuant), over the modality's own (1: as published), or between them, "
        "geometrically.",
    )
    rank: Union[int, float, str, None] = option(
        None,
        "of each modality's low-rank pair: a share of min(N, K) such as 0.05, a whole "
        "number, 0 for none, or auto; where it is not given 0.05, and 0 for effort fast",
        Rank(),
        'A float is a share, an int the rank itself. "auto" spends the bytes of a share '
        "of 0.05 on the linears and modalities where they gain most.",
        first=True,
    )
    group_size: Optional[int] = option(
        None, "weights that share a scale, in place of the scheme's", Whole(2)
    )
    shift: Optional[bool] = option(
        None,
        "take each modality's mean off its activations before they are rounded; as the "
        "method does where it is not given",
        Flag(),
        'Of the methods "masquant" does.',
    )
    rounding: Optional[str] = option(
        None,
        "of the shared weight, gptq (for all modalities jointly) or nearest; as the "
        "method does where it is not given",
        OneOf(("gptq", "nearest")),
        'Method "masquant" takes "gptq".',
    )
    clip: Optional[bool] = option(
        None,
        "search the part of the weight's range that its scales are made for; as the "
        "method does where it is not given",
        Flag(),
        'Of the methods "masquant" does.',
    )
    low_rank_bits: int = option(16, "of the low-rank pairs", OneOf((8, 16)))
    modality_weights: Optional[Mapping[str, float]] = option(
        None,
        "what an error in each modality weighs, 1 where it is not given; on the command "
        "line 'vision=0.2,audio=0.5', or 'measure' to find it on the data",
        Weights(),
        "Name of a modality to a factor, where modalities compete for the shared weight. "
        'For "gptq" and ``clip`` it multiplies the weight of each of the modality\'s '
        'tokens; for "auto" and learning that of the modality\'s mean. '
        ":func:`~torchao_masquant.modality_sensitivity` measures them.",
        metavar="WEIGHTS",
    )
    epochs: int = option(
        0,
        "of learning after the closed form",
        Whole(0),
        "The data runs so often through each block of the decoder, for gradients of all "
        "but the integers (:func:`torchao_masquant.learning.learn`). Zero for none. "
        '"masquant-paper" learns its smoothing factors, before all else; its authors '
        "for two epochs.",
    )
    lr: Optional[float] = option(
        None,
        "learning rate; where it is not given 3e-4, and 0.05 for masquant-paper",
        Amount(positive=True),
        'Relative to the size of what is learned; for "masquant-paper" that of the '
        "factors themselves.",
    )
    batch_size: int = option(
        1,
        "samples whose mean gradient makes one step of learning; with several "
        "processes, as many or a multiple",
        Whole(1, "sample"),
        "A larger one makes fewer steps of an epoch; ``lr`` is not changed for it.",
        metavar="SAMPLES",
        later=True,
    )
    hadamard_size: Optional[int] = option(
        None,
        "neighbouring channels that are rotated together before they are rounded, a "
        "power of two that divides every input width, or 1 for none; as the method does "
        "where it is not given",
        PowerOfTwo(),
        '"masquant" takes for each width the largest that divides it, of 512 at most; '
        "the others do not rotate.",
        metavar="CHANNELS",
        later=True,
        kw_only=True,
    )

    effort: str = option(
        "full",
        "full, or fast for a first result: no pairs unless a rank is given, and weights "
        "are rounded by Hessians that are decomposed in float32",
        OneOf(("full", FAST)),
        "Fast takes about half of the time; it is for large models, and for devices on "
        "which float64 is slow.",
        later=True,
        kw_only=True,
    )

    target: str = option(
        "masquant",
        "what will run the model: masquant; or compressed-tensors, for engines without "
        "this package",
        OneOf(("masquant", STOCK)),
        '"compressed-tensors" is for :func:`torchao_masquant.deploy.export_compressed_tensors`: '
        "one factor for all modalities, where a module before the linear can take it "
        "into its weight; no shift, rotation, pairs and biases.",
        later=True,
        kw_only=True,
    )

    budget: Optional[str] = option(
        None,
        "bits that a weight may take on average, '4.5 bits', with all that is stored of "
        "the quantized linears but for a head of 8 bits; what is chosen for each input then are the bits of its "
        "weights, and group size and rank where they are not given",
        Bits(),
        "Activations have the bits of the scheme; where both sides of a product are floats "
        "of 4 bits, inputs that are chosen to have 8 have them on both sides. The choices are those of least error "
        "on the sampled tokens, in one knapsack for all inputs whose statistics are there "
        "at the same time; ranks are 0.05 at most.",
        metavar="BITS",
        later=True,
        kw_only=True,
    )

    head_bits: int = option(
        16,
        "8 rounds the output head (lm_head) too, to 8 bits of weights and activations; "
        "16 leaves it as it is",
        OneOf((8, 16)),
        "Its channels are rotated and then rounded to nearest, whatever the method: that "
        "takes no data, and its tokens are of no modality. Of a model whose head shares its "
        "weight with the token embeddings these stay, and the head is stored beside them.",
        later=True,
        kw_only=True,
    )

    towers: Optional[str] = option(
        None,
        "scheme of the towers for images and sounds, which are quantized too then; w8a8 "
        "is the one to try",
        _SchemeName(),
        "None: they stay as they are, and where ``include`` names linears of theirs these "
        "are of the scheme of all. A tower's linears have a factor and a shift of their "
        "modality's, found from images, or sounds, that weigh the same each, and no pairs.",
        metavar="SCHEME",
        later=True,
        kw_only=True,
    )

    asymmetric_calibration: bool = option(
        False,
        "solve for one input after the other, each behind what is quantized already, for "
        "weights that also make up for what that has lost",
        Switch(),
        "Takes four to six times as long to see the data; of method masquant, of linears in "
        "the decoder's blocks alone, without a budget "
        "(:func:`torchao_masquant.solver.asymmetric.corrected`).",
        later=True,
        kw_only=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        # Files and reports compare it: as SCHEMES has it, however it was written.
        self.scheme = get_scheme(self.scheme).name
        self._check_floats()
        method = METHODS[self.method]
        if self.lr is None:
            self.lr = method.lr
        if self.target == STOCK:
            self._check_stock()
        if self.rank is None and self.budget and self.effort != FAST:
            self.rank = AUTO
        if self.rank is None:
            self.rank = 0 if self.effort == FAST or self.target == STOCK else 0.05
        if not method.centered and (
            self.shift
            or self.clip
            or self.rounding == "gptq"
            or self.hadamard_size not in (None, 1)
            or self.effort == FAST
            or self.budget
            or AUTO in (self.alpha, self.rank, self.separation)
        ):
            raise ValueError(
                f"method {self.method!r} is kept as it was published: shift, gptq, "
                "clip, rotations, auto, budgets and effort 'fast' are for method "
                "'masquant'."
            )
        if self.towers is not None:
            self.towers = get_scheme(self.towers).name
            # Raises where the other options do not go with that scheme.
            self.of_towers
        if self.budget:
            self._check_budget()
        if self.asymmetric_calibration:
            self._check_asymmetric()
        if self.epochs and not method.per_modality:
            raise ValueError(
                f"method {self.method!r} is kept as it was published: learning is for "
                "methods 'masquant' and 'masquant-paper'."
            )

    def _check_asymmetric(self) -> None:
        """Raise where nothing can make up for what earlier linears have lost."""
        strays = {
            f"method {self.method!r}": self.method != "masquant",
            f"target {self.target!r}": self.target == STOCK,
            f"rounding {self.rounding!r}": self.procedure.rounding != "gptq",
            f"budget={self.budget!r}": self.budget is not None,
        }
        given = [name for name, is_stray in strays.items() if is_stray]
        if given:
            raise ValueError(
                f"asymmetric_calibration has no place beside {given[0]}: leave one of "
                "them out."
            )

    def _check_budget(self) -> None:
        """Raise where there is nothing to choose, or no place for what is chosen."""
        if self.scheme == "w3a3":
            raise ValueError(
                "a budget is of bytes, and scheme 'w3a3' is simulated: it saves none."
            )
        if self.epochs:
            raise ValueError(
                "a budget has formats of their own for inputs, which learning does not "
                "know: give epochs=0, or no budget."
            )
        if not (self.procedure.rounding == "gptq" or self.procedure.clip):
            raise ValueError(
                "a budget is for integers that the recipe holds: give rounding='gptq' or "
                "clip=True, or no budget."
            )

    def _check_floats(self) -> None:
        """Raise where a scheme of floats does not have what is asked for."""
        scheme = get_scheme(self.scheme)
        if scheme.has_own_groups and self.group_size not in (None, scheme.group_size):
            raise ValueError(
                f"scheme {self.scheme!r} has groups of {scheme.group_size}, so "
                f"group_size={self.group_size!r} has no place in it: leave it out."
            )
        if scheme.floats and self.epochs:
            raise ValueError(
                f"learning is for schemes of integers, and {self.scheme!r} has floats: "
                "leave epochs out."
            )

    def _check_stock(self) -> None:
        """Raise where an engine of others has no place for what is asked for."""
        if self.scheme not in _STOCK_SCHEMES:
            raise ValueError(
                f"target {self.target!r} has no {self.scheme}: take scheme "
                f"{' or '.join(map(repr, _STOCK_SCHEMES))}."
            )
        strays = {
            "method": self.method != "masquant",
            "separation": self.separation not in (None, 0),
            "rank": self.rank not in (None, 0),
            "shift": bool(self.shift),
            "epochs": bool(self.epochs),
            "hadamard_size": self.hadamard_size not in (None, 1),
            "group_size": self.scheme == "w8a8" and self.group_size is not None,
            "budget": self.budget is not None,
            "head_bits": self.head_bits != 16,
            "towers": self.towers is not None,
        }
        given = [name for name, is_stray in strays.items() if is_stray]
        if given:
            raise ValueError(
                f"target {self.target!r} is one factor for all tokens and no more, so "
                f"{given[0]}={getattr(self, given[0])!r} has no place in it: leave it out."
            )

    @property
    def of_towers(self) -> "SolverOptions":
        """Those for the linears of towers, where no other modality competes."""
        alone = dataclasses.replace(self, towers=None, modality_weights=None)
        if self.towers is None:
            return alone
        return dataclasses.replace(alone, scheme=self.towers, group_size=None)

    def stored(self) -> dict[str, Any]:
        """As files hold them, for ``SolverOptions(**stored)``.

        An option that earlier files do not have is left out where it is as if it were
        not given: their readers refuse a name that they do not know, and an interrupted
        run goes on.
        """
        return {
            field.name: value
            for field in dataclasses.fields(SolverOptions)
            if (value := getattr(self, field.name)) != field.default
            or not option_of(field).later
        }

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
        rank = resolve_rank(share, n, k)
        if rank and isinstance(share, float):
            rank = max(rank, METHODS[self.method].rank_floor)
        return min(rank, n, k)

    @property
    def uniform_rank(self) -> Union[int, float]:
        """The rank where it is the same rule for all linears."""
        assert self.rank is not None and not isinstance(self.rank, str)
        return self.rank

    @property
    def average_share(self) -> Union[int, float]:
        """The uniform rank, or share of ``min(N, K)``, that takes as many bytes."""
        return AUTO_SHARE if self.rank == AUTO else self.uniform_rank

    def average_rank(self, n: int, k: int) -> int:
        """Of the pair of an (N, K) weight, where a uniform rank takes as many bytes."""
        return self.rank_of(self.average_share, n, k)

    def hadamard_size_of(self, in_features: int) -> Optional[int]:
        """Of the rotation of an input's channels; None for none.

        Args:
            in_features: K, which a size that was asked for divides
                (:func:`~torchao_masquant.calibration.request.check_shapes`).
        """
        if self.hadamard_size is not None:
            return self.hadamard_size if self.hadamard_size > 1 else None
        if not self.procedure.rotation:
            return None
        return largest_rotation(in_features)

    @property
    def number_format(self) -> Scheme:
        """The scheme, with the group size that is asked for."""
        scheme = get_scheme(self.scheme)
        if self.group_size is None:
            return scheme
        return dataclasses.replace(scheme, group_size=self.group_size)

    @property
    def procedure(self) -> Method:
        """The method, with what is asked for in place of what it does by itself."""
        given = {
            name: value
            for name in ("shift", "rounding", "clip")
            if (value := getattr(self, name)) is not None
        }
        if self.number_format.weight_only:
            # Nothing to round: a shift would change nothing.
            given["shift"] = False
        if self.target == STOCK:
            given |= dict(
                folded=True, gauge=False, centered=False, shift=False, rotation=False
            )
        return dataclasses.replace(METHODS[self.method], **given)

    def weights_of(self, modalities: Sequence[str]) -> list[float]:
        """What the error of each modality weighs, base first."""
        given = self.modality_weights or {}
        return [float(given.get(name, 1.0)) for name in modalities]


@shows_options
@dataclass
class QuantizationOptions(SolverOptions):
    """What is quantized of a model, for which modalities, and how.

    Attributes:
        {options}
    """

    base_modality: str = option(
        TEXT,
        "the modality that the shared weight is smoothed for, whose tokens cost nothing "
        "extra at run time",
        Values(),
    )
    modalities: Optional[Sequence[str]] = option(
        None,
        "those that the model will meet, 'text,vision', where they are not all that it "
        "could",
        Names(),
        "None for all that its config declares (only text where it has none).",
        metavar="NAMES",
    )
    include: NamePatterns = option(
        None,
        "names of the linears and expert weights to quantize, '*.mlp.*' or 're:...', in "
        "place of all of the decoder; may be given again",
        Patterns(),
        "A pattern, or a sequence of them: see :func:`~torchao_masquant.selection.select`.",
        metavar="PATTERN",
    )
    exclude: NamePatterns = option(
        None,
        "names to leave out; may be given again",
        Patterns(),
        metavar="PATTERN",
    )

    @property
    def options(self) -> SolverOptions:
        """Those of the solution, checked."""
        names = [field.name for field in dataclasses.fields(SolverOptions)]
        return SolverOptions(**{name: getattr(self, name) for name in names})


@shows_options
@dataclass
class CalibrationOptions(QuantizationOptions):
    """Options of :func:`torchao_masquant.calibrate`.

    Attributes:
        {options}
    """

    max_statistics_bytes: int = option(
        MAX_STATISTICS_BYTES,
        "bound of the covariances' memory; the data runs several times where they do "
        "not fit",
        Amount("of bytes"),
        metavar="BYTES",
    )
    progress: bool = option(True, "show a bar on a terminal", NoFlag())

    def __post_init__(self) -> None:
        super().__post_init__()
        # Here, and not of every solution: what is stored, and given again, holds the
        # learning rate of its method.
        told = {
            "lr": self.lr != METHODS[self.method].lr,
            "batch_size": self.batch_size != 1,
        }
        if self.epochs == 0 and any(told.values()):
            named = " and ".join(name for name, given in told.items() if given)
            raise ValueError(
                f"{named} would do nothing where nothing is learned: give epochs=1 or "
                f"more, or leave {named} out."
            )
