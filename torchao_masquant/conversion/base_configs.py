# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""torchao's own configs as schemes of ours, for ``MASQuantConfig(base_config, step=...)``."""

from typing import Any, Optional

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    PerAxis,
    PerGroup,
    PerRow,
)
from torchao.quantization.quant_primitives import MappingType

__all__ = ["scheme_of_base_config"]

_KNOWN = (
    "Int8DynamicActivationInt8WeightConfig (w8a8), "
    "Int8DynamicActivationIntxWeightConfig of torch.int4 or torch.int8 (w4a8, w8a8) and "
    "Int4WeightOnlyConfig (w4a16)"
)


def scheme_of_base_config(config: AOBaseConfig) -> tuple[str, Optional[int]]:
    """The scheme that has a torchao config's integers.

    Its packing, kernels and choice of scales are torchao's own and are not looked at;
    activations are always symmetric here.

    Args:
        config: of torchao.

    Returns:
        Name of the scheme, and the group size, None for one scale per output channel.

    Raises:
        ValueError: no scheme has these integers.
    """
    if isinstance(config, Int8DynamicActivationInt8WeightConfig):
        _check(
            config, config.act_mapping_type == MappingType.SYMMETRIC, "act_mapping_type"
        )
        _check(config, not config.weight_only_decode, "weight_only_decode")
        rows = config.granularity
        rows = rows if isinstance(rows, (list, tuple)) else [rows]
        _check(config, all(isinstance(r, PerRow) for r in rows), "granularity")
        return "w8a8", None
    if isinstance(config, Int8DynamicActivationIntxWeightConfig):
        # torch has the type, and its stubs have not.
        int4: torch.dtype = getattr(torch, "int4")
        bits = {int4: "w4a8", torch.int8: "w8a8"}
        _check(config, config.weight_dtype in bits, "weight_dtype")
        symmetric = config.weight_mapping_type != MappingType.ASYMMETRIC
        _check(config, symmetric, "weight_mapping_type")
        granularity = config.weight_granularity
        _check(
            config, isinstance(granularity, (PerGroup, PerAxis)), "weight_granularity"
        )
        group_size = getattr(granularity, "group_size", None)
        return bits[config.weight_dtype], group_size
    if isinstance(config, Int4WeightOnlyConfig):
        return "w4a16", config.group_size
    raise ValueError(
        f"no scheme of MASQuant has the integers of {type(config).__name__}: as a "
        f"base_config it takes {_KNOWN}."
    )


def _check(config: Any, fits: bool, name: str) -> None:
    if not fits:
        raise ValueError(
            f"no scheme of MASQuant has the integers of {type(config).__name__} with "
            f"{name}={getattr(config, name)!r}: as a base_config it takes {_KNOWN}."
        )
