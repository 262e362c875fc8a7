# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is asked of a model, against its shapes, names and modalities: before any data."""

import math
from typing import Any, Iterable, Mapping, Optional, Sequence

from torch import nn

from torchao_masquant.budget import check_budget
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.decoder_blocks import decoder_blocks
from torchao_masquant.options import CalibrationOptions, SolverOptions
from torchao_masquant.routing import Router
from torchao_masquant.selection import Selected, select

__all__ = [
    "base_first",
    "check_options",
    "check_request",
    "check_session",
    "check_shapes",
]

# A message names no more linears than this.
_SHOWN = 3

# Group sizes that kernels like: one of these is proposed where one divides.
_GROUPS = (256, 192, 128, 96, 64, 48, 32, 16, 8)


def check_request(
    model: nn.Module,
    selected: Selected,
    modalities: Sequence[str],
    options: SolverOptions,
) -> None:
    """Raise where options do not suit a model, whatever the data may be.

    Args:
        model: whose weights may be on the meta device.
        selected: what is quantized of it.
        modalities: that it will meet, base first.
        options: of the solution.

    Raises:
        ValueError: names the linears concerned, and a way out.
    """
    shapes = selected.widths
    _check_towers(selected.towers, options)
    first = next(iter(selected.experts), None)
    if options.procedure.folded and first is not None:
        raise ValueError(
            f"{first} is of experts, which are not exported to other engines: exclude "
            "'*.experts.*'."
        )
    if options.budget and first is not None:
        raise ValueError(
            f"a budget is for linears alone, and {first} is of experts: give none, or "
            "exclude '*.experts.*'."
        )
    # After those: another budget would not help where there can be none.
    _check_all(selected.widths, selected.towers, modalities, options)
    for what, without, is_asked in (
        ("learning", "epochs=0", options.epochs > 0),
        (
            "asymmetric calibration",
            "asymmetric_calibration=False",
            options.asymmetric_calibration,
        ),
    ):
        if not is_asked:
            continue
        if first is not None:
            raise ValueError(
                f"{what} is for linears alone, and {first} is of experts: calibrate "
                f"with {without}, or exclude '*.experts.*'."
            )
        decoder_blocks(model, list(shapes))


def check_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise where a model tells that it cannot be calibrated so.

    Args:
        model: of transformers; its weights may be on the meta device.
        options: of :func:`~torchao_masquant.calibrate`.

    Raises:
        ValueError: as :func:`check_request`.
        TypeError: an option is of the wrong type.
    """
    asked = CalibrationOptions(**options)
    modalities = base_first(model, asked.base_modality, asked.modalities)
    selected = select(model, asked.include, asked.exclude, asked, len(modalities))
    check_request(
        model, selected, Router.for_model(model, modalities).modalities, asked
    )


def check_shapes(
    shapes: Mapping[str, tuple[int, int]],
    modalities: Sequence[str],
    options: SolverOptions,
    *,
    part: str = "",
    give: str = "give",
) -> None:
    """The same as far as shapes and names tell.

    Args:
        shapes: name to (N, K) of each linear, and of each expert of a projection.
        modalities: base first.
        options: of the solution.
        part: of the model that they are all of, see :func:`check_budget`.
        give: what a message says before the group size that it proposes.

    Raises:
        ValueError: as :func:`check_request`.
    """
    _check_widths(shapes)
    # A budget has the group sizes that suit each width, where none is given.
    if not options.budget or options.group_size is not None:
        _check_groups(shapes, options, give)
    if options.budget:
        check_budget(shapes, len(modalities), options, part=part)
    _check_rotation(shapes, options)
    _check_weights(modalities, options)


def check_session(session: CalibrationSession, options: SolverOptions) -> None:
    """Raise unless a session has what :func:`solve` needs.

    Raises:
        ValueError: a linear or a modality was left out by the data; a group size does
            not divide the width of a linear; a tower has no place in what is asked for.
    """
    session.check_complete()
    _check_towers([n for n in session.layers if n in session.towers], options)
    _check_all(
        {n: (m.out_features, m.in_features) for n, m in session.layers.items()},
        session.towers,
        session.router.modalities,
        options,
        part=" observed at one time",
    )


def base_first(
    model: nn.Module, base_modality: str, modalities: Optional[Sequence[str]]
) -> tuple[str, ...]:
    """The modalities to calibrate for, base first.

    Args:
        model: its config, where it has one, declares what it can meet.
        base_modality: must be one of them.
        modalities: a choice among them; None for all.

    Raises:
        ValueError: the base is not among them, or one is named twice.
        TypeError: they are no sequence of names.
    """
    if isinstance(modalities, str):
        raise TypeError(
            f"modalities are a sequence of names, got the string {modalities!r}: write "
            f"({modalities!r},)."
        )
    if modalities is None:
        modalities = Router.for_model(model).modalities
    if not isinstance(modalities, Sequence) or not all(
        isinstance(name, str) for name in modalities
    ):
        raise TypeError(
            f"modalities are a sequence of names, such as ('text', 'vision'), got "
            f"{modalities!r}."
        )
    names = tuple(modalities)
    if len(set(names)) < len(names):
        raise ValueError(f"modalities must be distinct names, got {names}.")
    if base_modality not in names:
        raise ValueError(
            f"base_modality {base_modality!r} is not one of the modalities {names}."
        )
    return (base_modality, *(m for m in names if m != base_modality))


def _check_all(
    shapes: Mapping[str, tuple[int, int]],
    towers: Mapping[str, str],
    modalities: Sequence[str],
    options: SolverOptions,
    *,
    part: str = "",
) -> None:
    """Those of towers by options of their own."""
    of_decoder = {n: shape for n, shape in shapes.items() if n not in towers}
    of_towers = {n: shape for n, shape in shapes.items() if n in towers}
    if of_decoder or not of_towers:
        check_shapes(of_decoder, modalities, options, part=part)
    if of_towers:
        # A group size that is given is the decoder's, where both have a scheme.
        alone = "calibrate the towers by themselves, with include and"
        give = "give" if options.towers is None else alone
        _check_weights(modalities, options)
        check_shapes(of_towers, modalities, options.of_towers, give=give)


def _check_towers(towers: Iterable[str], options: SolverOptions) -> None:
    tower = next(iter(towers), None)
    if tower is None:
        return
    refused = {
        f"target {options.target!r} is for decoders alone": options.procedure.folded,
        "learning goes through a decoder's blocks alone": options.epochs > 0,
        "a budget is for decoders alone": options.budget is not None,
        "asymmetric calibration goes through a decoder's blocks alone": (
            options.asymmetric_calibration
        ),
    }
    for reason, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"{reason}, and {tower} is of a tower: calibrate the towers by "
                "themselves, without it."
            )


def _check_widths(shapes: Mapping[str, tuple[int, int]]) -> None:
    narrow = [name for name, (_, k) in shapes.items() if k < 2]
    if narrow:
        raise ValueError(
            f"{_some(narrow, shapes)} too few input channels (1) to be quantized: "
            "exclude them."
        )


def _check_groups(
    shapes: Mapping[str, tuple[int, int]], options: SolverOptions, give: str
) -> None:
    size = options.number_format.group_size
    odd = [name for name, (_, k) in shapes.items() if size and k % size]
    if not size or not odd:
        return
    widths = {k for _, k in shapes.values()}
    common = math.gcd(*widths)
    fits = [g for g in _GROUPS if common % g == 0] or [
        g for g in range(2, common + 1) if common % g == 0
    ]
    nearest = sorted(fits, key=lambda g: abs(math.log(g / size)))[:2]
    whose = "" if options.group_size else f", which scheme {options.scheme!r} has,"
    of = {shapes[name][1] for name in odd}
    if options.number_format.has_own_groups:
        raise ValueError(
            f"scheme {options.scheme!r} has groups of {size}, which do not divide the input "
            f"width ({_numbers(of)}) of {_some(odd, shapes, verb=False)}: exclude them, or "
            "take a scheme with one scale for each output channel."
        )
    way = (
        f"{give} group_size={' or '.join(map(str, sorted(nearest)))}, which divides all"
        if nearest
        else f"no group size divides all of {_numbers(widths)}"
    )
    raise ValueError(
        f"group_size={size}{whose} does not divide the input width ({_numbers(of)}) of "
        f"{_some(odd, shapes, verb=False)}: {way}, or exclude them."
    )


def _check_rotation(
    shapes: Mapping[str, tuple[int, int]], options: SolverOptions
) -> None:
    size = options.hadamard_size
    odd = [name for name, (_, k) in shapes.items() if size and k % size]
    if not odd:
        return
    common = math.gcd(*(k for _, k in shapes.values()))
    largest = common & -common
    fits = [str(1 << power) for power in range(1, largest.bit_length())]
    way = (
        f"give hadamard_size={' or '.join(fits[-_SHOWN:])}, which divides all"
        if fits
        else "no power of two divides all of them"
    )
    of = {shapes[name][1] for name in odd}
    raise ValueError(
        f"hadamard_size={size} does not divide the input width ({_numbers(of)}) of "
        f"{_some(odd, shapes, verb=False)}: {way}, leave it out for what suits each, or "
        "exclude them."
    )


def _check_weights(modalities: Sequence[str], options: SolverOptions) -> None:
    unknown = [n for n in options.modality_weights or {} if n not in modalities]
    if unknown:
        raise ValueError(
            f"modality_weights name {', '.join(map(repr, unknown))}, which is not one of "
            f"the modalities {tuple(modalities)}."
        )
    if not any(options.weights_of(modalities)):
        raise ValueError(
            "modality_weights are zero for every modality: nothing would be solved for."
        )


def _some(names: Sequence[str], of: Mapping[str, object], verb: bool = True) -> str:
    """How many, and the first few."""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    have = (" has" if len(names) == 1 else " have") if verb else ""
    return f"{len(names)} of {len(of)} linears ({shown}){have}"


def _numbers(values: Iterable[int]) -> str:
    found = [str(value) for value in sorted(values)]
    return " and ".join([", ".join(found[:-1]), found[-1]] if found[1:] else found)
