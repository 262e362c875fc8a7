# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the constants that ``masquant plan`` reckons with.

    python benchmarks/plan_constants.py [--name NAME] [-o PATH]

Of one core of this machine, in processor time; about a minute and a half. Without ``-o`` it
renews those that come with the package.
"""

import argparse
from pathlib import Path
from typing import Optional

from torchao_masquant.atomic_files import replacing
from torchao_masquant.planning.machine import Machine
from torchao_masquant.planning.measuring import measure_machine

_SHIPPED = Path(__file__).parents[1] / "torchao_masquant/planning/machines/cpu.json"


def main(arguments: Optional[list[str]] = None) -> Machine:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=_SHIPPED)
    parser.add_argument(
        "--disk", type=float, default=1e9, help="bytes a second of reading weights"
    )
    parser.add_argument(
        "--link", type=float, default=1e9, help="bytes a second between two machines"
    )
    options = parser.parse_args(arguments)
    machine = measure_machine(options.name, options.disk, options.link)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.output) as temporary:
        machine.save(temporary)
    print(options.output.read_text())
    return machine


if __name__ == "__main__":
    main()
