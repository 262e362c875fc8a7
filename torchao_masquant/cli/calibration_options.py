# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Options of a calibration, for the commands that calibrate."""

import argparse
import dataclasses
from typing import Any, Callable, Optional, Union

from torchao_masquant.cli.ending import UsageError
from torchao_masquant.option_fields import option_of
from torchao_masquant.option_values import MEASURE, Flag, Patterns, as_number
from torchao_masquant.options import CalibrationOptions

__all__ = [
    "add_calibration_options",
    "add_option",
    "add_patterns",
    "calibration_options",
    "given_options",
    "number",
    "whole",
]

_FIELDS = {
    field.name: field
    for field in dataclasses.fields(CalibrationOptions)
    if option_of(field).values.has_flag
}

_PATTERNS = [n for n, f in _FIELDS.items() if isinstance(option_of(f).values, Patterns)]


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an argument, of a function whose errors are sentences."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def number(text: str) -> Union[int, float]:
    """The type of an argument that is a number."""
    return _typed(as_number)(text)


def whole(least: int) -> Any:
    """The type of an argument that is a whole number of ``least`` or more."""

    def read(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise ValueError(f"{text!r} is no whole number of {least} or more.")
        return int(text)

    return _typed(read)


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_option(group: Any, name: str, about: Optional[str] = None) -> None:
    """The flag of an option.

    Args:
        group: a parser, or a group of its arguments.
        name: of a field of :class:`CalibrationOptions`.
        about: what it is, where a command means something else by it.
    """
    field = _FIELDS[name]
    said = option_of(field)
    text = (about or said.about).replace("%", "%%")
    told = field.default is not None and field.default != 0
    keywords: dict[str, Any] = {
        "default": field.default,
        "help": f"{text} (default: %(default)s)" if told else text,
    }
    if isinstance(said.values, Flag):
        keywords["action"] = argparse.BooleanOptionalAction
    else:
        keywords["type"] = _typed(said.values.read)
        keywords["choices"] = said.values.choices
        keywords["metavar"] = said.metavar
    if isinstance(said.values, Patterns):
        keywords["action"] = "append"
    group.add_argument(_flag_of(name), **keywords)


def add_patterns(parser: argparse.ArgumentParser) -> None:
    """Which linears."""
    for name in _PATTERNS:
        add_option(parser, name)


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Scheme, method, and what tunes the method."""
    group = parser.add_argument_group("tuning the method")
    for name, field in _FIELDS.items():
        if name not in _PATTERNS:
            add_option(parser if option_of(field).first else group, name)


def calibration_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of :func:`torchao_masquant.calibrate`, as far as they are wrong by themselves.

    Its ``modality_weights`` may be "measure".

    Raises:
        UsageError: one is out of range, or two do not go together.
    """
    found = {name: getattr(arguments, name) for name in _FIELDS}
    checked = dict(found)
    if checked["modality_weights"] == MEASURE:
        checked["modality_weights"] = None
    try:
        CalibrationOptions(**checked)
    except (TypeError, ValueError) as error:
        raise UsageError(_as_typed(str(error))) from error
    modalities = found["modalities"]
    if modalities is not None and found["base_modality"] not in modalities:
        raise UsageError(
            f"--base-modality {found['base_modality']!r} is not one of --modalities "
            f"{','.join(modalities)}."
        )
    return found


def _as_typed(message: str) -> str:
    """A message that begins with an option's name in Python, with that of the shell."""
    first, space, rest = message.partition(" ")
    return f"{_flag_of(first)}{space}{rest}" if first in _FIELDS else message


def given_options(arguments: argparse.Namespace) -> list[str]:
    """Options of a calibration that are not as they are when none is given."""
    return [
        _flag_of(name)
        for name in (*_FIELDS, "max_samples")
        if name not in _PATTERNS
        and getattr(arguments, name, None) != arguments.default_of(name)
    ]
