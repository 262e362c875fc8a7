# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The weights that copies, files and pieces are tried on: one named list."""

from typing import Callable

import pytest
import torch
from tensor_oracle import SCHEMES, inner_tensors, make, unrouted

from torchao_masquant.tensor_subclasses import MASQuantTensor


def of_3_bits() -> MASQuantTensor:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    return MASQuantTensor.from_hp(
        weight, weight_bits=3, act_bits=16, symmetric=False, group_size=2
    )


CASES: dict[str, Callable[[], MASQuantTensor]] = {
    **{scheme: lambda scheme=scheme: make(scheme).tensor for scheme in SCHEMES},
    "odd width": lambda: make("w4a8", shape=(5, 15)).tensor,
    "groups": lambda: make("w4a8", group_size=4).tensor,
    "asymmetric groups": lambda: make("w4a16", group_size=4).tensor,
    "asymmetric 3 bits": of_3_bits,
    "pair of 8 bits": lambda: make("w4a8", low_rank_bits=8).tensor,
    "weight-only, pair of 8 bits": lambda: make("w4a16", low_rank_bits=8).tensor,
    "no pair": lambda: make(ranks=()).tensor,
    "no modality bias": lambda: make(with_bias=False).tensor,
    "unrouted": unrouted,
    "bfloat16": lambda: make(dtype=torch.bfloat16).tensor,
    "rotation": lambda: make("w4a8", hadamard_size=4).tensor,
}
every_case = pytest.mark.parametrize("name", CASES)


def storages(tensor: MASQuantTensor) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in inner_tensors(tensor).values()]
