# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``completion``: what a shell needs to complete the others."""

import argparse

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
The script is for this version: write it again after an upgrade.

examples:
  masquant completion bash > ~/.local/share/bash-completion/completions/masquant
  masquant completion zsh > ~/.zfunc/_masquant    # a folder of your fpath
  masquant completion fish > ~/.config/fish/completions/masquant.fish
"""

_SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the completion."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS)
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the script.

    Returns:
        Exit code.
    """
    import shtab

    from torchao_masquant.cli.commands import main_parser, with_all_arguments

    parser = with_all_arguments(main_parser())
    parser.prog = "masquant"
    _complete_files(parser)
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Offer files for what takes a value of no fixed set."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.nargs != 0 and action.choices is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
