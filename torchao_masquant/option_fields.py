# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A field of a dataclass that says all there is to know of an option.

What it is, what it may be and how the command line writes it stands beside its name,
type and default. Checks, the flags of the command line, signatures and docstrings are
made of it, so that a new option is a new field and nothing else.
"""

import dataclasses
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Concatenate,
    Optional,
    ParamSpec,
    TypeVar,
)

from torchao_masquant.option_values import Values

__all__ = [
    "Option",
    "check_options",
    "option",
    "option_of",
    "shows_options",
    "takes_options",
]

# The place in a docstring that options are put at.
_PLACEHOLDER = "{options}"

# Columns of a line of a docstring.
_WIDTH = 88

_C = TypeVar("_C", bound=type)
_M = TypeVar("_M")
_S = TypeVar("_S")
_O = TypeVar("_O")
_R = TypeVar("_R")
_P = ParamSpec("_P")


@dataclass(frozen=True)
class Option:
    """What a field says beside its name, type and default.

    Attributes:
        about: what the option is, for ``--help`` and for docstrings; no sentence.
        more: sentences for docstrings alone.
        values: that it may have; None, too, where that is its default.
        metavar: what ``--help`` calls the value.
        first: whether ``--help`` lists it in front of those that tune a method.
        later: whether there are files from before there was the option.
    """

    about: str
    more: str
    values: Values
    metavar: Optional[str]
    first: bool
    later: bool


def option(
    default: Any,
    about: str,
    values: Values,
    more: str = "",
    *,
    metavar: Optional[str] = None,
    first: bool = False,
    later: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field of a dataclass; see :class:`Option`."""
    said = Option(about, more, values, metavar, first, later)
    return dataclasses.field(
        default=default, kw_only=kw_only, metadata={"option": said}
    )


def option_of(field: "dataclasses.Field[Any]") -> Option:
    """What :func:`option` said of a field."""
    return field.metadata["option"]


def _options(of: Any) -> "dict[dataclasses.Field[Any], Option]":
    """Those of a dataclass, or an instance: a dataclass may have other fields beside."""
    return {
        field: option_of(field)
        for field in dataclasses.fields(of)
        if "option" in field.metadata
    }


def check_options(options: Any) -> None:
    """Raise where a field of an instance has a value that it may not have.

    Raises:
        TypeError: it is of another type.
        ValueError: it is out of range.
    """
    for field, said in _options(options).items():
        value = getattr(options, field.name)
        if value is not None or field.default is not None:
            said.values.check(field.name, value)


def _documentation(options: type, indent: str) -> str:
    """Entries of a docstring's section."""
    entries = []
    for field, said in _options(options).items():
        text = f"{field.name}: {said.about}."
        entries.append(
            textwrap.fill(
                f"{text} {said.more}".rstrip(),
                _WIDTH,
                initial_indent=indent,
                subsequent_indent=f"{indent}    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(entries)


def _filled(text: Optional[str], options: type) -> Optional[str]:
    """A docstring with the options where it has a place for them."""
    # python -OO takes docstrings away.
    if text is None:
        return None
    lines = []
    for line in text.split("\n"):
        if line.strip() == _PLACEHOLDER:
            indent = line[: -len(line.lstrip())]
            line = _documentation(options, indent)
        lines.append(line)
    return "\n".join(lines)


def shows_options(cls: _C) -> _C:
    """A dataclass whose docstring has its options in the place of ``{options}``."""
    cls.__doc__ = _filled(cls.__doc__, cls)
    return cls


def takes_options(
    options: Callable[_P, _O],
) -> Callable[[Callable[[_M, _S, _O], _R]], Callable[Concatenate[_M, _S, _P], _R]]:
    """Give a function of three arguments, the last of them options, a keyword for each.

    Args:
        options: their dataclass. ``help``, ``inspect.signature`` and type checkers show
            its fields as the function's keywords, and they stand in the function's
            docstring where that says ``{options}``.
    """
    assert isinstance(options, type)
    fields = [field for field in dataclasses.fields(options) if field.init]

    def decorate(
        function: Callable[[_M, _S, _O], _R],
    ) -> Callable[Concatenate[_M, _S, _P], _R]:
        signature = inspect.signature(function)
        first = list(signature.parameters.values())[:2]
        keywords = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in fields
        ]
        shown = signature.replace(parameters=[*first, *keywords])

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> _R:
            try:
                bound = shown.bind(*args, **given).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            before = [bound.pop(parameter.name) for parameter in first]
            return function(*before, options(**bound))  # type: ignore[call-arg]

        call.__doc__ = _filled(function.__doc__, options)
        call.__signature__ = shown  # type: ignore[attr-defined]
        return call

    return decorate
