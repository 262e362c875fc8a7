# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Names, types and shapes of the tensors in safetensors files, without their values."""

import os
from typing import Sequence

import safetensors
import torch

from torchao_masquant.tensor_subclasses.weight_layout import TensorKind

__all__ = ["stored_tensors"]

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def stored_tensors(files: Sequence[str]) -> dict[str, TensorKind]:
    """What is stored in some files, read from their headers.

    Args:
        files: paths of safetensors files.

    Returns:
        Name to type and shape.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is of another kind (nothing is unpickled), is cut off or
            damaged, holds a type that no quantized model has, or a name is there twice.
    """
    found: dict[str, TensorKind] = {}
    for path in files:
        file = os.path.basename(path)
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{file} is not there, though the checkpoint's index names it: download "
                "or save the checkpoint again."
            )
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    stored = opened.get_slice(name)
                    kind = stored.get_dtype()
                    if not name.isprintable():
                        raise ValueError(f"{name!r} is no name of a tensor")
                    if kind not in _TYPES:
                        raise ValueError(f"{name} is of type {kind}")
                    if name in found:
                        raise ValueError(f"{name} is in another file, too")
                    found[name] = _TYPES[kind], tuple(stored.get_shape())
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            if not file.endswith(".safetensors"):
                raise ValueError(
                    f"{file} is no safetensors file, which a MASQuant checkpoint is made "
                    "of: save the model again."
                ) from error
            raise ValueError(
                f"{file} is cut off or damaged ({str(error).rstrip('.')}): download or "
                "save it again."
            ) from error
    return found
