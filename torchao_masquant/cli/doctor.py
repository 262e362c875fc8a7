# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``doctor``: what runs here, and why; what is missing."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchao_masquant.cli.diagnosis import Diagnosis

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
The exit code is 1 where something stands in the way of the fast kernels of this
machine, such as a missing compiler, or where a library is installed that cannot be
imported.

examples:
  masquant doctor
  masquant doctor --json | jq .kernels
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the diagnosis."""
    parser.epilog = _EXAMPLES
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Look around.

    Returns:
        Exit code: 1 where there is a problem.
    """
    from torchao_masquant.cli.diagnosis import diagnose

    found = diagnose()
    print(json.dumps(found.to_json(), indent=2) if arguments.json else _text(found))
    return 1 if found.problems else 0


def _text(found: "Diagnosis") -> str:
    from torchao_masquant.evaluation.tables import new_table, to_text

    table = new_table(
        "Kernel of the product, by scheme and tokens of a call",
        ["device", "scheme", "1 token", "256 tokens", "why"],
        [],
    )
    for row in found.kernels:
        table.add_row(row.device, row.scheme, row.few, row.many, row.reason)
    parts = [
        _section("versions", found.versions),
        _section("devices", found.devices),
        _section("kernels on the CPU", found.cpu),
        to_text(table),
        _section("libraries for data and figures", found.libraries),
        *(f"problem: {problem}" for problem in found.problems),
    ]
    if not found.problems:
        parts.append("Nothing stands in the way.")
    return "\n".join(parts)


def _section(title: str, entries: dict[str, Any]) -> str:
    width = max(map(len, entries), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in entries.items()]
    return "\n".join([title, *lines, ""])
