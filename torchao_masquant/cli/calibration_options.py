# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Options of a calibration, for the commands that calibrate."""

import argparse
import dataclasses
import re
from typing import Any, Union

from torchao_masquant.cli.ending import UsageError
from torchao_masquant.schemes import SCHEMES
from torchao_masquant.solver.methods import AUTO, METHODS, SolverOptions

__all__ = [
    "MEASURE",
    "add_calibration_options",
    "add_patterns",
    "calibration_options",
    "given_options",
    "number",
    "whole",
]

#: value of ``--modality-weights`` that finds them on the data
MEASURE = "measure"


def number(text: str) -> Union[int, float]:
    """A whole number, or one with a point or an exponent."""
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number.") from None


def whole(least: int) -> Any:
    """The type of an argument that is a whole number of ``least`` or more."""

    def read(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no whole number of {least} or more."
            )
        return int(text)

    return read


def _number_or_auto(text: str) -> Union[int, float, str]:
    return AUTO if text == AUTO else number(text)


def _modality_weights(text: str) -> Union[str, dict[str, float]]:
    if text == MEASURE:
        return MEASURE
    try:
        pairs = [entry.split("=") for entry in text.split(",")]
        return {name: float(weight) for name, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {MEASURE!r} nor such as 'vision=0.2,audio=0.5'."
        ) from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of different names such as 'text,vision'."
        )
    return names


def _pattern(text: str) -> str:
    if text.startswith("re:"):
        try:
            re.compile(text.removeprefix("re:"))
        except re.error as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no regular expression: {error}."
            ) from None
    return text


def add_patterns(parser: argparse.ArgumentParser) -> None:
    """Which linears."""
    parser.add_argument(
        "--include",
        action="append",
        type=_pattern,
        metavar="PATTERN",
        help="names of the linears to quantize, '*.mlp.*' or 're:...', in place of all "
        "of the decoder; may be given again",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        type=_pattern,
        metavar="PATTERN",
        help="names to leave out; may be given again",
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Scheme, method, and what tunes the method."""
    parser.add_argument(
        "--scheme",
        type=str.lower,
        choices=list(SCHEMES),
        default="w4a8",
        help="bits of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        type=str.lower,
        choices=list(METHODS),
        default="masquant",
        help="masquant; masquant-paper, as published; smoothquant, one factor for all "
        "tokens; rtn, round-to-nearest (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=_number_or_auto,
        default=0.05,
        help="of each modality's low-rank pair: a share of min(N, K) such as 0.05, a "
        "whole number, 0 for none, or auto (default: %(default)s)",
    )
    group = parser.add_argument_group("tuning the method")
    group.add_argument(
        "--alpha",
        type=_number_or_auto,
        help="exponent of the activations in the smoothing factor, 0..1, or auto, which "
        "judges three on sampled tokens (default: 0.5)",
    )
    group.add_argument(
        "--separation",
        type=_number_or_auto,
        help="how far a modality's factor goes from that of all tokens, 0..1, or auto, "
        "as above (default: 0 for masquant, 1 for masquant-paper)",
    )
    group.add_argument(
        "--group-size",
        type=int,
        help="weights that share a scale, in place of the scheme's",
    )
    group.add_argument(
        "--hadamard-size",
        type=whole(1),
        metavar="CHANNELS",
        help="neighbours that are rotated together before rounding, a power of two that "
        "divides every input width, or 1 for none; masquant: the largest of each width, "
        "512 at most",
    )
    for name, purpose in (
        ("shift", "each modality's mean is taken off before rounding"),
        ("clip", "the part of the weight's range that scales are made for is searched"),
    ):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"{purpose}; as the method does where it is not given",
        )
    group.add_argument(
        "--rounding",
        choices=("gptq", "nearest"),
        help="of the shared weight; as the method does where it is not given",
    )
    group.add_argument(
        "--low-rank-bits", type=int, choices=(8, 16), default=16, help="of the pairs"
    )
    group.add_argument(
        "--modality-weights",
        type=_modality_weights,
        metavar="WEIGHTS",
        help="what an error in each modality weighs, 'vision=0.2,audio=0.5', or "
        "'measure' to find it on the data",
    )
    group.add_argument(
        "--modalities",
        type=_names,
        metavar="NAMES",
        help="that the model will meet, 'text,vision', where it is not all it could",
    )
    group.add_argument(
        "--base-modality",
        default="text",
        help="the one that costs nothing extra at run time (default: %(default)s)",
    )
    group.add_argument(
        "--epochs", type=int, default=0, help="of learning after the closed form"
    )
    group.add_argument(
        "--lr",
        type=float,
        help="learning rate (default: 3e-4, and 0.05 for masquant-paper)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="SAMPLES",
        help="of one step of learning; with several processes, as many or a multiple "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-statistics-bytes",
        type=whole(1),
        default=4 << 30,
        metavar="BYTES",
        help="of covariances; the data runs several times where they do not fit "
        "(default: %(default)s)",
    )


_SOLVER = tuple(field.name for field in dataclasses.fields(SolverOptions))
_OTHERS = (
    "include",
    "exclude",
    "modalities",
    "base_modality",
    "max_statistics_bytes",
)


def calibration_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of :func:`torchao_masquant.calibrate`, as far as they are wrong by themselves.

    Its ``modality_weights`` may be "measure".

    Raises:
        UsageError: one is out of range, or two do not go together.
    """
    found = {
        name: getattr(arguments, name)
        for name in (*_SOLVER, *_OTHERS)
        if hasattr(arguments, name)
    }
    solver = {name: found[name] for name in _SOLVER if name in found}
    if solver["modality_weights"] == MEASURE:
        solver["modality_weights"] = None
    try:
        SolverOptions(**solver)
    except (TypeError, ValueError) as error:
        raise UsageError(_as_typed(str(error), solver)) from error
    modalities = found["modalities"]
    if modalities is not None and found["base_modality"] not in modalities:
        raise UsageError(
            f"--base-modality {found['base_modality']!r} is not one of --modalities "
            f"{','.join(modalities)}."
        )
    return found


def _as_typed(message: str, names: Any) -> str:
    """A message that begins with an option's name in Python, with that of the shell."""
    first, space, rest = message.partition(" ")
    return f"--{first.replace('_', '-')}{space}{rest}" if first in names else message


def given_options(arguments: argparse.Namespace) -> list[str]:
    """Options of a calibration that are not as they are when none is given."""
    return [
        f"--{name.replace('_', '-')}"
        for name in (*_SOLVER, *_OTHERS, "max_samples")
        if name not in ("include", "exclude")
        and getattr(arguments, name, None) != arguments.default_of(name)
    ]
