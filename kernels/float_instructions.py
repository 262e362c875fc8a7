# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which devices multiply which number format, and warnings where one does not."""

import enum
import functools
import warnings
from typing import Optional

import torch

from torchao_masquant.kernels.gpu.tuning import table_name
from torchao_masquant.kernels.number_formats import number_format

__all__ = [
    "Product",
    "has_instruction",
    "product_on",
    "warn_of_decoding",
    "warn_of_emulation",
    "why_no_instruction",
]


class Product(enum.IntEnum):
    """How a GPU's kernels multiply tokens in a number format.

    Attributes:
        DECODED: as bfloat16, which holds every code times a scale of 8 bits, since there
            is no instruction for them.
        E4M3: as they are; scales multiply sums.
        FNUZ: as MI300's e4m3, which has other exponents and a single zero.
        SCALED: as they are, with the scales of groups.
    """

    DECODED = 0
    E4M3 = 1
    FNUZ = 2
    SCALED = 3


def product_on(architecture: Optional[str], act_format: str) -> Product:
    """How tokens are multiplied on an architecture.

    Args:
        architecture: as tables are named: "sm_90", "gfx942"; None: no GPU that is there.
        act_format: a name in :data:`~torchao_masquant.kernels.number_formats.FORMATS`.
    """
    form = number_format(act_format)
    scaled = form.scale_dtype != torch.float32
    if architecture is None:
        return Product.DECODED
    if architecture.startswith("gfx"):
        # AMD's scales are powers of two.
        if scaled:
            found = architecture == "gfx950" and not form.two_levels
            return Product.SCALED if found else Product.DECODED
        if architecture.startswith("gfx94"):
            return Product.FNUZ
        newer = architecture.startswith(("gfx950", "gfx12"))
        return Product.E4M3 if newer else Product.DECODED
    capability = int(architecture.removeprefix("sm_"))
    if scaled:
        return Product.SCALED if capability >= 100 else Product.DECODED
    return Product.E4M3 if capability >= 89 else Product.DECODED


def has_instruction(act_format: str, device: torch.device) -> bool:
    """Whether a device multiplies activations of a format as they are.

    Args:
        act_format: a name in :data:`~torchao_masquant.kernels.number_formats.FORMATS`.
        device: one that is there.
    """
    return product_on(table_name(device), act_format) is not Product.DECODED


def why_no_instruction(act_format: str, device: torch.device) -> Optional[str]:
    """What a device lacks for a format, in words; None where it lacks nothing."""
    if has_instruction(act_format, device):
        return None
    if device.type != "cuda":
        return f"no {device.type.upper()} multiplies {act_format!r}"
    form = number_format(act_format)
    if form.scale_dtype == torch.float32:
        least = "compute capability 8.9, gfx942 or gfx12"
    elif form.two_levels:
        least = "compute capability 10.0"
    else:
        least = "compute capability 10.0 or gfx950"
    return f"{act_format!r} is multiplied from {least} on"


@functools.lru_cache(maxsize=None)
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def warn_of_decoding(device: torch.device, act_format: str) -> None:
    """Say once for each format that a GPU's kernel multiplies it as bfloat16."""
    lacking = why_no_instruction(act_format, device)
    if lacking is not None:
        _warn(
            f"activations in {act_format!r} are turned into bfloat16 in a GPU's registers "
            f"and multiplied so, at the rate of bfloat16 or less: {lacking}."
        )


def warn_of_emulation(device: torch.device) -> None:
    """Say once for each kind of device that the plain operators run there."""
    if device.type != "meta":
        _warn(
            "activations in number formats of floats are emulated on this device "
            f"({device.type}): weights and tokens are decoded to float32 and multiplied "
            "so, which takes longer than the linear that was quantized."
        )
