# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The operators' telling cases on a GPU: those of the tests, by the tests' tolerances.

The list of cases, their float64 formulas and what float32 may lose are the tests' own;
``gpu_visit.sh`` puts these modules where they are found.
"""

from pathlib import Path
from typing import Any

import torch
from backends import PRODUCT, TILINGS, WEIGHT_ONLY, Triton, check
from operator_cases import BY_ID, operands

__all__ = ["TELLING", "check_case", "names"]

# One of each kind: sizes, mixes of modalities, pairs, types, weights, rotations, layouts.
TELLING = (
    "one-token",
    "odd-sizes",
    "bfloat16",
    "w4-groups",
    "spans",
    "seventeen-tokens",
    "beyond-tiles",
    "long-rows",
    "no-ids",
    "no-tokens",
    "unequal-ranks",
    "wide-ranks",
    "many-modalities",
    "int8-pair",
    "fp32-pair",
    "float16",
    "odd-groups",
    "groups-of-one-token",
    "symmetric",
    "shift-of-base",
    "sink",
    "rotation-64",
    "rotation-512",
    "transposed",
    "wider",
)
# Without a GPU, in Triton's interpreter: each operator once.
_QUICK = ("one-token",)


class _Watched(Triton):
    """Keeps what it ran last."""

    last: dict[str, Any] = {}

    def run(self, operator: str, *args: Any) -> Any:
        self.last = {"operator": operator, "args": args, "tiling": self.config}
        found = super().run(operator, *args)
        self.last["found"] = found
        return found


def names(quick: bool) -> list[tuple[str, str]]:
    """Operator and case, the most telling first."""
    chosen = _QUICK if quick else TELLING
    return [(operator, id) for id in chosen for operator in BY_ID[id].operators]


def check_case(operator: str, id: str, folder: str) -> None:
    """Run a case in every tiling of the tests, and in the one that a call takes.

    Raises:
        AssertionError: a result is not within its tolerance; the call is saved.
    """
    # None is what is taken without a tiling.
    TILINGS[operator].setdefault("a call's own", None)  # type: ignore[arg-type]
    backend = _Watched()
    try:
        check(backend, operator, operands(id), BY_ID[id].ties)
    except Exception as error:
        path = Path(folder) / "failed.pt"
        torch.save({**backend.last, "case": id, "error": str(error)}, path)
        raise AssertionError(
            f"{operator}, {id}: {error}\nThe call is in {path.name}."
        ) from error


assert {PRODUCT, WEIGHT_ONLY} <= set(TILINGS)
