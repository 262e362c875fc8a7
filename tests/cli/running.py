# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Commands run in this process, and what they say."""

import json
from typing import Any

from torchao_masquant.__main__ import main


def run(*arguments: object) -> int:
    """The exit code of a command."""
    return main([str(argument) for argument in arguments])


def printed(capsys: Any, *arguments: object) -> Any:
    """What a command that succeeds prints, as JSON."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: Any, *arguments: object) -> str:
    """The one sentence that a command fails with."""
    capsys.readouterr()
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and line.endswith((".", "?", "!"))
    return line
