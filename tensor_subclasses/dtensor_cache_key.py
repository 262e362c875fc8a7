# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Compiled graphs that take a distributed weight are told apart by what is in it.

torch keeps graphs, on disk too, under a key of all that they were made for. A DTensor's
part of it tells the placement, shape and type, and nothing of the local tensor: a graph
for 8-bit activations, whose bits are constants in it, would be taken for 6-bit ones.
"""

import hashlib
from typing import Any

from torch.distributed.tensor import DTensor

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__ = ["extend_cache_key"]


def extend_cache_key() -> None:
    """Add a local MASQuantTensor's own key to the key of a DTensor."""
    of_dtensor = getattr(DTensor, "_stable_hash_for_caching", None)
    # Without a key of its own torch looks into the local tensor, as it should.
    if of_dtensor is None or getattr(of_dtensor, "_knows_local", False):
        return

    def key(self: Any) -> str:
        local = self._local_tensor
        if not isinstance(local, MASQuantTensor):
            return of_dtensor(self)
        both = of_dtensor(self) + local._stable_hash_for_caching()
        return hashlib.sha256(both.encode()).hexdigest()

    key._knows_local = True  # type: ignore[attr-defined]
    DTensor._stable_hash_for_caching = key  # type: ignore[method-assign]
