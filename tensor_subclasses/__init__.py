# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tensor subclasses of MASQuant."""

from torchao_masquant.tensor_subclasses import (  # noqa: F401
    copying,
    creating,
    distributing,
    expert_linear,
    indexing,
    joining,
    linear_operator,
    memory,
)
from torchao_masquant.tensor_subclasses.dtensor_cache_key import extend_cache_key
from torchao_masquant.tensor_subclasses.low_rank_pair import (
    low_rank_dtype,
    quantize_low_rank_pair,
)
from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor
from torchao_masquant.tensor_subclasses.smoothed_weight import (
    check_group_size,
    dequantize_smoothed_weight,
    quantize_smoothed_weight,
)

__all__ = [
    "MASQuantTensor",
    "check_group_size",
    "dequantize_smoothed_weight",
    "low_rank_dtype",
    "quantize_low_rank_pair",
    "quantize_smoothed_weight",
]

extend_cache_key()
