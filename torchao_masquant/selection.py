# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which linears and experts of a model are quantized."""

import fnmatch
import logging
from dataclasses import dataclass, field, replace
from typing import Callable, Collection, Iterable, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.expert_modules import RoutedExperts
from torchao_masquant.models.experts import (
    ExpertWeight,
    Layer,
    experts_of,
    module_of,
    projections,
    warn_of_expert_weights,
)
from torchao_masquant.models.families import family_of
from torchao_masquant.models.parts import Decoder, find_decoder, heads_of
from torchao_masquant.models.towers import tower_linears
from torchao_masquant.option_values import compiled
from torchao_masquant.options import NamePatterns, SolverOptions, resolve_rank
from torchao_masquant.weight_bytes import Compensation, weight_bytes

__all__ = [
    "Selected",
    "check_plain",
    "check_whole",
    "decoder_of",
    "is_named",
    "match_names",
    "select",
    "select_linears",
    "towers_asked_for",
]

_LOGGER = logging.getLogger(__name__)

# Small linears are left out of a decoder only where they are less than this share of its
# weights: more of them is a toy, whose bytes nobody counts.
_LARGEST_SHARE = 0.25

_UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
_Convolution = nn.modules.conv._ConvNd


def _matching(names: Sequence[str], patterns: NamePatterns, option: str) -> set[str]:
    """Names that match a pattern; raises for a pattern that matches none."""
    matched: set[str] = set()
    given = [patterns] if isinstance(patterns, str) else patterns or ()
    if not isinstance(given, Iterable) or not all(isinstance(p, str) for p in given):
        raise TypeError(f"{option} must be patterns of names, got {patterns!r}.")
    for pattern in given:
        hits = [n for n in names if _matches(n, pattern)]
        if not hits:
            raise ValueError(
                f"{option} pattern {pattern!r} matches no linear of the model; its "
                f"linears are named like {names[0]!r}."
                if names
                else f"{option} pattern {pattern!r} matches nothing: the model has no "
                "linear."
            )
        matched.update(hits)
    return matched


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return compiled(pattern).fullmatch(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def is_named(name: str, patterns: NamePatterns) -> bool:
    """Whether a full name matches one of these patterns."""
    given = [patterns] if isinstance(patterns, str) else patterns or ()
    return any(_matches(name, pattern) for pattern in given)


def match_names(
    names: Sequence[str],
    include: NamePatterns = None,
    exclude: NamePatterns = None,
    default: Optional[Sequence[str]] = None,
) -> list[str]:
    """Narrow names down by patterns.

    Args:
        names: full names of linears.
        include: patterns of those to take; None for ``default``.
        exclude: patterns of those to leave out.
        default: what to take where nothing is included; None for all.

    Returns:
        The rest, in the same order.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    if include is not None:
        chosen = _matching(names, include, "include")
    else:
        chosen = set(names if default is None else default)
    chosen -= _matching(names, exclude, "exclude")
    if not chosen:
        raise ValueError(
            f"no linear is left to quantize: look at include ({include!r}) and exclude "
            f"({exclude!r})."
        )
    return [name for name in names if name in chosen]


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that turns token embeddings into hidden states.

    Raises:
        ValueError: it cannot be told.
    """
    found = find_decoder(model)
    if found is None:
        raise _unknown(model)
    return found.module


def _unknown(model: nn.Module) -> ValueError:
    return ValueError(
        f"which part of {type(model).__name__} is its decoder cannot be told: name its "
        "linears with include, such as include='language_model.layers.*'."
    )


@dataclass(frozen=True)
class Selected:
    """What is quantized of a model.

    Attributes:
        linears: name in the model to module, in the model's order.
        experts: name in the model to the weights of a mixture's experts, both
            projections of each of them.
        towers: name of those linears that are a tower's to the one modality that they
            meet; the others meet all.
    """

    linears: dict[str, nn.Linear]
    experts: dict[str, ExpertWeight]
    towers: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Layer]:
        """Both, by name."""
        return {**self.linears, **self.experts}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weight of each, (N, K) or (E, N, K)."""
        return {name: layer.weight for name, layer in self.layers.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(N, K) of each linear, (E, N, K) of each weight of experts."""
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear, and of each expert of a weight."""
        return {n: (shape[-2], shape[-1]) for n, shape in self.shapes.items()}

    def where(self, chosen: Callable[[str], bool]) -> "Selected":
        """Those whose name is chosen."""
        return Selected(
            {name: m for name, m in self.linears.items() if chosen(name)},
            {name: w for name, w in self.experts.items() if chosen(name)},
            {name: m for name, m in self.towers.items() if chosen(name)},
        )

    def modalities_of(self, name: str, met: Sequence[str]) -> tuple[str, ...]:
        """Those that a linear, or experts, meet, base first.

        Args:
            name: of it.
            met: those of the model.
        """
        return (self.towers[name],) if name in self.towers else tuple(met)


def select_linears(
    model: nn.Module, include: NamePatterns = None, exclude: NamePatterns = None
) -> dict[str, nn.Linear]:
    """The linears of :func:`select`, for what has nothing to say of experts.

    Raises:
        ValueError: as :func:`select`, where experts alone are left, and where towers
            are among them.
    """
    selected = select(model, include, exclude)
    linears = selected.linears
    if selected.towers:
        raise ValueError(
            f"{next(iter(selected.towers))} is of a tower, whose tokens are of one "
            "modality, so that there is nothing to compare: leave it out."
        )
    if not linears:
        raise ValueError(
            f"include ({include!r}) and exclude ({exclude!r}) leave experts alone, and "
            "no linear."
        )
    return linears


def select(
    model: nn.Module,
    include: NamePatterns = None,
    exclude: NamePatterns = None,
    options: Optional[SolverOptions] = None,
    modalities: int = 1,
    done: Collection[nn.Module] = (),
) -> Selected:
    """What to quantize: by default, all of the language model's decoder.

    Args:
        model: a transformers model, or any module. The decoder, as
            :mod:`torchao_masquant.models.parts` finds it, is the default choice, without
            towers, talkers and heads; a module that holds no language model is taken
            whole. What :mod:`torchao_masquant.models.families` says of its kind is left out,
            too.
        include: patterns of full names, in place of the default choice. They reach
            towers, too.
        exclude: patterns of full names to leave out.
        options: of the solution: linears that it would not make smaller (gates of a few
            rows) are left out of the default choice, with a warning, unless they are a
            quarter of the weights or more. None: all stay. Where they have a scheme for
            ``towers``, these belong to the default choice, with what joins them to the
            decoder.
        modalities: that the solution is for.
        done: modules that an unfinished call has been through: they are chosen as all
            others are, and then left out, whatever has become of them.

    Patterns are shell-style (``*.layers.0.*``), or regular expressions that match the
    whole name where they start with ``re:``, as in torchao's ``FqnToConfig``. Experts
    go by the names of their parameters (``*.experts.*``).

    Raises:
        ValueError: a pattern matches nothing, nothing is left to quantize, there is a
            scheme for towers and no linear of one is chosen, a linear is
            no plain one of the decoder or a tower, experts are chosen in part, or which
            part is the decoder cannot be told and ``include`` does not say it.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    experts = experts_of(model)
    layers: dict[str, Layer] = {**linears, **experts}
    modules = {name: module_of(layer) for name, layer in layers.items()}
    decoder = find_decoder(model)
    if decoder is None:
        if include is None:
            raise _unknown(model)
        # Whoever names the linears of an unknown decoder knows it.
        decoder = Decoder(model)
    family = family_of(getattr(model, "config", None))
    heads = {id(head) for head in heads_of(model)}
    inside, usual = decoder.possible() - heads, decoder.usual() - heads
    default = [
        n
        for n, m in modules.items()
        if id(m) in inside & usual
        and not any(fnmatch.fnmatchcase(n, p) for p in family.high_precision)
    ]
    if include is None:
        special = [n for n in default if n in linears and _is_special(linears[n])]
        default = [n for n in default if n not in special]
        if special:
            _LOGGER.warning(
                "left out %d linears of a class of their own, %s (%s) the first, which "
                "computes more than a product.",
                len(special),
                special[0],
                type(linears[special[0]]).__name__,
            )
    if include is None and options is not None:
        candidates = {n: linears[n] for n in default if n in linears}
        small = _growing(candidates, options, modalities)
        if _values(small) < _LARGEST_SHARE * _values(candidates):
            default = [n for n in default if n not in small]
            _tell_of_small(small)
    towers = towers_asked_for(model, include, options)
    if include is None:
        # A few classes of torch use the weight without calling the linear.
        default += [name for name in towers if type(linears[name]) is not _UNCALLED]
    names = match_names(list(modules), include, exclude, default)
    outside = [name for name in names if id(modules[name]) not in inside]
    for name in outside:
        if name not in towers:
            raise ValueError(
                f"{name} is not part of the decoder, nor of a tower, so what it is "
                "called with are not the call's tokens, whose modalities are known: leave it out."
            )
    for name in names:
        module = modules[name]
        if module in done:
            continue
        check_plain(name, layers[name])
    check_whole(names, experts)
    if outside:
        _tell_of_convolutions(model, inside)
    elif options is not None and options.towers is not None:
        raise ValueError(
            f"towers={options.towers!r} has nothing to do, since no linear of a tower is "
            f"chosen of {type(model).__name__}: leave it out, or look at include "
            f"({include!r}) and exclude ({exclude!r})."
        )
    warn_of_expert_weights(decoder.module, experts.values())
    names = [name for name in names if modules[name] not in done]
    return Selected(
        {name: linears[name] for name in names if name in linears},
        {name: experts[name] for name in names if name in experts},
        {name: towers[name] for name in outside if name in names},
    )


def towers_asked_for(
    model: nn.Module, include: NamePatterns, options: Optional[SolverOptions]
) -> dict[str, str]:
    """Linears of towers, see :func:`tower_linears`, where any may be chosen."""
    has_scheme = options is not None and options.towers is not None
    return tower_linears(model) if include is not None or has_scheme else {}


def _is_special(linear: nn.Linear) -> bool:
    """Whether a model of transformers has a class of its own for it, as for routers."""
    return type(linear).__module__.startswith("transformers.models.")


def _values(linears: Mapping[str, nn.Linear]) -> int:
    return sum(linear.weight.numel() for linear in linears.values())


def _growing(
    linears: Mapping[str, nn.Linear], options: SolverOptions, modalities: int
) -> dict[str, nn.Linear]:
    """Those whose quantized weight would take no fewer bytes than they do.

    A rank that is given and large is meant so: it counts as the default one.
    """
    found = Compensation.of(options, modalities)
    usual = Compensation().rank
    return {
        name: linear
        for name, linear in linears.items()
        if type(linear.weight.data) is torch.Tensor
        and weight_bytes(
            n := linear.out_features,
            k := linear.in_features,
            options.number_format,
            replace(found, rank=min(found.rank, resolve_rank(usual, n, k)))
            if isinstance(found.rank, int)
            else replace(found, rank=min(found.rank, usual)),
        )
        >= linear.weight.nbytes
    }


def _tell_of_small(small: Mapping[str, nn.Linear]) -> None:
    if small:
        name, linear = next(iter(small.items()))
        _LOGGER.warning(
            "left out %d linear%s that quantizing would not make smaller, %s (%d x %d) "
            "the first: include takes them all the same.",
            len(small),
            "s" if len(small) > 1 else "",
            name,
            linear.out_features,
            linear.in_features,
        )


def _tell_of_convolutions(model: nn.Module, decoder: Collection[int]) -> None:
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _Convolution) and id(module) not in decoder
    ]
    if found:
        _LOGGER.warning(
            "left out %d convolutions of towers, %s the first: linears alone are "
            "quantized.",
            len(found),
            found[0],
        )


def check_plain(name: str, layer: Layer) -> None:
    """Raise unless a linear, or experts, are as a model has them before all else.

    Raises:
        ValueError: names it.
    """
    if isinstance(layer, ExpertWeight):
        if isinstance(layer.module, RoutedExperts):
            raise ValueError(
                f"{name} is quantized or observed already, or needs to be excluded."
            )
    # A subclass may compute something else than x W^T + b.
    elif type(layer) is not nn.Linear:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, not a plain nn.Linear: it is "
            "quantized or observed already, or needs to be excluded."
        )
    held = type(layer.weight.data)
    if held is not torch.Tensor:
        raise ValueError(
            f"{name} holds a {held.__name__}, not a plain tensor: it is quantized "
            "already, or needs to be excluded."
        )


def check_whole(names: Sequence[str], experts: Mapping[str, ExpertWeight]) -> None:
    """Raise where one projection of experts is chosen, and the other is not.

    Args:
        names: that are chosen.
        experts: all of the model, by name.

    Raises:
        ValueError: names one.
    """
    chosen = set(names)
    for name in names:
        if name not in experts:
            continue
        prefix = name.removesuffix(experts[name].parameter)
        for other in projections(experts[name].module) or ():
            if prefix + other not in chosen:
                raise ValueError(
                    f"experts are quantized as a whole, and {name} is chosen without "
                    f"{prefix}{other}: include or exclude both."
                )
