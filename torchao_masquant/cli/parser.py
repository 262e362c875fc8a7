# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Arguments of a command: loaded when they are needed, with advice for a typo."""

import argparse
import difflib
import importlib
from typing import Any, Iterable, NoReturn, Optional, Sequence

__all__ = ["CommandParser", "MainParser", "add_output_options"]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a text, and wraps one that has none."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class MainParser(argparse.ArgumentParser):
    """A parser that says what may have been meant.

    Descriptions and examples keep line breaks where they have some. Options are written out: an
    abbreviation that is right today is another option's tomorrow.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """End with 2 and one line: what is wrong, and where the options are."""
        text = message if message.endswith((".", "?", "!")) else f"{message}."
        self.exit(2, f"error: {text} '{self.prog} --help' says more.\n")

    # Any: argparse's own signatures differ between its overloads.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        unknown = self._left_over(parsed, unknown)
        # Here, and not where argparse does it: the command knows its options.
        if unknown:
            self.error(self._unrecognized(unknown))
        return parsed, unknown

    def _left_over(self, parsed: Any, unknown: list[str]) -> list[str]:
        """What none of the arguments takes."""
        return unknown

    def _unrecognized(self, unknown: Sequence[str]) -> str:
        message = f"unrecognized arguments: {' '.join(unknown)}"
        for argument in unknown:
            if argument.startswith("-"):
                advice = _advice(argument.split("=")[0], self._option_string_actions)
                if advice:
                    return message + advice
        return message

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _advice(str(value), map(str, action.choices or ()))
            raise


def _advice(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class CommandParser(MainParser):
    """The parser of one command, whose module is imported when it is called.

    Attributes:
        module: its name; it has ``add_arguments(parser)`` and ``main(arguments)``.
    """

    module: Optional[str] = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._is_complete = False
        self.add_argument(
            "--debug",
            action="store_true",
            help="show where an error comes from (MASQUANT_DEBUG=1 does, too)",
        )

    def complete(self) -> None:
        """Add the command's own arguments, which wait until they are needed."""
        if self.module is not None and not self._is_complete:
            self._is_complete = True
            importlib.import_module(self.module).add_arguments(self)

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command.

        Returns:
            Exit code.
        """
        assert self.module is not None
        return importlib.import_module(self.module).main(arguments)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete()
        return super().parse_known_args(args, namespace)

    def _left_over(self, parsed: Any, unknown: list[str]) -> list[str]:
        # argparse gives an optional argument up where an option comes before it.
        for action in self._get_positional_actions():
            if (
                action.nargs == argparse.OPTIONAL
                and getattr(parsed, action.dest) is None
            ):
                for word in unknown:
                    if not word.startswith("-"):
                        setattr(parsed, action.dest, self._get_value(action, word))
                        unknown.remove(word)
                        break
        return unknown


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write over what this command has written before; nothing else ever is",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON"
    )
