# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchao_masquant``, and the command ``masquant``."""

import contextlib
import os
import sys
from typing import Optional, Sequence

from torchao_masquant.cli.commands import main_parser
from torchao_masquant.cli.ending import WRONG_USAGE, is_debugging, run
from torchao_masquant.cli.noise import plain_messages, quiet_libraries
from torchao_masquant.cli.waiting_threads import spin_shortly


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for the process's own.

    Returns:
        Exit code.

    Raises:
        SystemExit: with 2 where the arguments are wrong, with 0 after help.
    """
    if arguments is None:
        # It is this process's command, so that how its threads wait is for it to say.
        spin_shortly(os.environ)
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = main_parser()
    if not given:
        parser.print_help(sys.stderr)
        sys.exit(WRONG_USAGE)
    parsed = parser.parse_args(given)
    loud = is_debugging(parsed)
    with plain_messages(), contextlib.nullcontext() if loud else quiet_libraries():
        return run(parsed.run, parsed)


if __name__ == "__main__":
    sys.exit(main())
