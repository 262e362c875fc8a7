# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How long OpenMP's threads spin while they wait for each other."""

from typing import MutableMapping

__all__ = ["spin_shortly"]

# Some 0.2 ms. GCC's OpenMP spins a hundred times as long, which on a machine whose cores
# are busy is the time that the others need; to sleep at once costs half of a small call.
_SPINS = "3000"


def spin_shortly(environ: MutableMapping[str, str]) -> None:
    """Have threads sleep soon, unless the user has said how they wait.

    Args:
        environ: environment variables; of the process, they are read when torch is
            imported, so that this comes before.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", _SPINS)
