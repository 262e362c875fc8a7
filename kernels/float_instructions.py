# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which devices multiply which number format, and a warning where it is emulated."""

import functools
import warnings
from typing import Optional

import torch

__all__ = ["has_instruction", "warn_of_emulation", "why_no_instruction"]

# Compute capability, and names of AMD's architectures, from which on there is an instruction
# for products of e4m3, and for those with scales of groups. (MI300's gfx942 multiplies
# another e4m3, with other exponents and a single zero.)
_FLOAT8 = (8, 9), ("gfx950", "gfx12")
_SCALED = (10, 0), ("gfx950",)


def has_instruction(act_format: str, device: torch.device) -> bool:
    """Whether a device multiplies activations of a format as they are.

    Args:
        act_format: a name in :data:`~torchao_masquant.kernels.number_formats.FORMATS`.
        device: one that is there.
    """
    if device.type != "cuda":
        return False
    capability, names = _FLOAT8 if act_format.startswith("e4m3") else _SCALED
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return name.startswith(names)
    return torch.cuda.get_device_capability(device) >= capability


def why_no_instruction(act_format: str, device: torch.device) -> Optional[str]:
    """What a device lacks for a format, in words; None where it lacks nothing."""
    if has_instruction(act_format, device):
        return None
    if device.type != "cuda":
        return f"no {device.type.upper()} multiplies {act_format!r}"
    capability, names = _FLOAT8 if act_format.startswith("e4m3") else _SCALED
    least = (
        f"compute capability {capability[0]}.{capability[1]} or {' or '.join(names)}"
    )
    return f"{act_format!r} is multiplied from {least} on"


@functools.lru_cache(maxsize=None)
def _warn(device_type: str) -> None:
    warnings.warn(
        "activations in number formats of floats are emulated on this device "
        f"({device_type}): weights and tokens are decoded to float32 and multiplied so, "
        "which takes longer than the linear that was quantized.",
        stacklevel=4,
    )


def warn_of_emulation(device: torch.device) -> None:
    """Say once for each kind of device that the plain operators run there."""
    if device.type != "meta":
        _warn(device.type)
