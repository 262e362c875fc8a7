# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One or more stages of a visit, in this process.

    python -m gpu_visit STAGE... --out FOLDER --until MOMENT

``gpu_visit.sh`` calls it, with a process for each stage.
"""

import argparse
import sys
from pathlib import Path
from typing import Optional

import torch

from gpu_visit.place import begin, is_dry
from gpu_visit.record import Record


def main(words: Optional[list[str]] = None) -> int:
    """Returns 0; 1 where something is wrong; 2 where there is no GPU."""
    from gpu_visit.stages import STAGES, Visit, machine

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="the results' folder")
    parser.add_argument(
        "--until", type=float, required=True, help="when they end, seconds of the epoch"
    )
    options = parser.parse_args(words)
    if not is_dry() and not torch.cuda.is_available():
        print(
            "there is no GPU here: run this where there is one, or set DRY_RUN=whole.",
            file=sys.stderr,
        )
        return 2
    begin()
    record = Record(options.out / "visit.json")
    record.write("machine", machine())
    right = True
    for stage in options.stages:
        visit = Visit(record, options.out, options.until)
        print(f"== {stage}, {visit.left:.0f} s", flush=True)
        right &= STAGES[stage](visit)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
