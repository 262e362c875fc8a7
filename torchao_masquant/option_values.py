# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What an option may be: its check, and how a word of the command line is read."""

import math
import re
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Union

__all__ = [
    "AUTO",
    "MEASURE",
    "Amount",
    "Bits",
    "Flag",
    "Names",
    "NoFlag",
    "OneOf",
    "Patterns",
    "PowerOfTwo",
    "Rank",
    "Share",
    "Switch",
    "Values",
    "Weights",
    "Whole",
    "as_number",
    "bits_of",
    "compiled",
]

#: Value of ``alpha``, ``separation`` and ``rank`` that leaves the choice to the solver.
AUTO = "auto"

#: Value of ``--modality-weights`` with which a command finds them on the data.
MEASURE = "measure"

_SMALLEST_WEIGHT = 1e-20


class Values:
    """The values that an option may have: any, and none on the command line."""

    #: All of them, where they can be listed.
    choices: Optional[tuple[Any, ...]] = None

    #: Whether the command line has a flag for the option.
    has_flag = True

    def check(self, name: str, value: Any) -> None:
        """Raise where a value is not one of them.

        Raises:
            TypeError: it is of another type.
            ValueError: it is out of range.
        """

    def read(self, text: str) -> Any:
        """The value that a word of the command line stands for, unchecked.

        Raises:
            ValueError: it stands for none; its message is a sentence.
        """
        return text


class Flag(Values):
    """True, False or None."""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, got {value!r}.")


class Switch(Flag):
    """True or False."""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}.")


@dataclass(frozen=True)
class OneOf(Values):
    """A few words, or a few numbers."""

    choices: tuple[Any, ...]

    def check(self, name: str, value: Any) -> None:
        kind = type(self.choices[0])
        if type(value) is kind and value in self.choices:
            return
        if kind is str:
            listed = ", ".join(self.choices)
            raise ValueError(f"unknown {name} {value!r}: choose one of {listed}.")
        listed = " or ".join(map(str, self.choices))
        raise ValueError(f"{name} must be {listed}, got {value!r}.")

    def read(self, text: str) -> Any:
        return text.lower() if isinstance(self.choices[0], str) else _as_whole(text)


@dataclass(frozen=True)
class Whole(Values):
    """Whole numbers.

    Attributes:
        least: the smallest of them.
        unit: for a message, in the singular.
    """

    least: int
    unit: str = ""

    def check(self, name: str, value: Any) -> None:
        if type(value) is not int:
            raise TypeError(f"{name} must be an int, got {value!r}.")
        if value >= self.least:
            return
        least = f"at least {self.least} {self.unit}".rstrip()
        must = f"be {least}" if self.least else "not be negative"
        raise ValueError(f"{name} must {must}, got {value}.")

    def read(self, text: str) -> int:
        return _as_whole(text)


class PowerOfTwo(Values):
    """1, 2, 4, 8 and so on."""

    def check(self, name: str, value: Any) -> None:
        if type(value) is not int:
            raise TypeError(f"{name} must be an int or None, got {value!r}.")
        if value < 1 or value & (value - 1):
            raise ValueError(
                f"{name} must be a power of two, or 1 for no rotation, got {value}."
            )

    def read(self, text: str) -> int:
        return _as_whole(text)


class Share(Values):
    """0..1, or "auto"."""

    def check(self, name: str, value: Any) -> None:
        if value == AUTO:
            return
        if not _is_number(value):
            raise TypeError(f"{name} must be a number or 'auto', got {value!r}.")
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}.")

    def read(self, text: str) -> Union[int, float, str]:
        return AUTO if text == AUTO else as_number(text)


class Rank(Values):
    """An int, a share of a weight's smaller dimension as a float, or "auto"."""

    def check(self, name: str, value: Any) -> None:
        if value == AUTO:
            return
        if not _is_number(value):
            raise TypeError(f"{name} must be an int or a float, got {value!r}.")
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
        if isinstance(value, float) and value > 1:
            raise ValueError(
                f"a {name} of type float is a share of min(N, K), 0..1, got {value}; "
                "give an int for an absolute rank."
            )

    def read(self, text: str) -> Union[int, float, str]:
        return AUTO if text == AUTO else as_number(text)


@dataclass(frozen=True)
class Amount(Values):
    """Numbers that are not negative.

    Attributes:
        of: for a message, "of bytes".
        positive: whether they are finite and above zero, too.
    """

    of: str = ""
    positive: bool = False

    def check(self, name: str, value: Any) -> None:
        if not _is_number(value):
            must = f"a number {self.of}".rstrip()
            raise TypeError(f"{name} must be {must}, got {value!r}.")
        if self.positive and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}.")
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")

    def read(self, text: str) -> Union[int, float]:
        return as_number(text)


class Bits(Values):
    """A number of bits, "4.5 bits"."""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be such as '4.5 bits', got {value!r}.")
        try:
            bits_of(value)
        except ValueError as error:
            raise ValueError(f"{name} must be {error}") from None

    def read(self, text: str) -> str:
        return text


class Weights(Values):
    """Names of modalities, each with a number."""

    def check(self, name: str, value: Any) -> None:
        must = f"{name} must be a dict of names and numbers, got"
        if not isinstance(value, Mapping):
            raise TypeError(f"{must} {value!r}.")
        for key, weight in value.items():
            if not isinstance(key, str) or not _is_number(weight):
                raise TypeError(f"{must} {key!r}: {weight!r}.")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"{name} of {key!r} must be finite and not negative, got {weight}."
                )
            # Beyond, what is summed over tokens is nothing or too large for float32.
            if weight and not _SMALLEST_WEIGHT <= weight <= 1 / _SMALLEST_WEIGHT:
                raise ValueError(
                    f"{name} of {key!r} must be 0, or lie in {_SMALLEST_WEIGHT:g}.."
                    f"{1 / _SMALLEST_WEIGHT:g}, got {weight}."
                )

    def read(self, text: str) -> Union[str, dict[str, float]]:
        if text == MEASURE:
            return MEASURE
        try:
            pairs = [entry.split("=") for entry in text.split(",")]
            weights = {name: float(weight) for name, weight in pairs}
        except ValueError:
            raise ValueError(
                f"{text!r} is neither {MEASURE!r} nor such as 'vision=0.2,audio=0.5'."
            ) from None
        if len(weights) < len(pairs):
            raise ValueError(f"{text!r} names a modality twice.")
        return weights


class Names(Values):
    """Different names, which the model says whether they are right."""

    def read(self, text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(
                f"{text!r} is no list of different names such as 'text,vision'."
            )
        return names


class Patterns(Values):
    """Patterns of names, one each time that a flag is given."""

    def read(self, text: str) -> str:
        if text.startswith("re:"):
            compiled(text)
        return text


class NoFlag(Values):
    """Any, of an option that a call has and a command has not."""

    has_flag = False


def compiled(pattern: str) -> "re.Pattern[str]":
    """The regular expression of a pattern of names that begins with "re:".

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from None


def bits_of(text: str) -> float:
    """The number of "4.5 bits".

    Raises:
        ValueError: it is none, or not above zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*", text)
    if found is None or not (0 < float(found[1]) < math.inf):
        raise ValueError(f"such as '4.5 bits', got {text!r}.")
    return float(found[1])


def as_number(text: str) -> Union[int, float]:
    """A whole number, or one with a point or an exponent.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number.") from None


def _as_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
