# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a calibration block by block takes beside the options of every calibration."""

import os
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Union

import torch

from torchao_masquant.option_fields import option, shows_options
from torchao_masquant.option_values import Amount, NoFlag, OneOf
from torchao_masquant.options import CalibrationOptions

__all__ = ["SequentialOptions"]


@shows_options
@dataclass(kw_only=True)
class SequentialOptions(CalibrationOptions):
    """Options of :func:`torchao_masquant.sequential.calibrate_sequential`.

    Attributes:
        {options}
    """

    output: Union[str, os.PathLike, None] = option(
        None, "folder of the quantized checkpoint to write", NoFlag()
    )
    recipe: Union[str, os.PathLike, None] = option(
        None, "file of the recipe to write", NoFlag(), "At least one of the two."
    )
    dtype: Optional[torch.dtype] = option(
        None, "to run the model in; None for what its config says", NoFlag()
    )
    device: Union[str, torch.device] = option(
        "cpu", "where blocks run and are solved for", NoFlag()
    )
    activations: str = option(
        "memory",
        "where samples' hidden states are kept between blocks, memory or disk",
        OneOf(("memory", "disk")),
        "On disk they lie in mapped files in the folder of the run.",
    )
    model_class: Optional[type] = option(
        None, "of transformers; None for the one that the config names", NoFlag()
    )
    max_memory_bytes: Optional[int] = option(
        None,
        "that each process may take; None for what is free on the machine, shared by "
        "its processes",
        Amount("of bytes"),
    )
    max_seconds: Optional[float] = option(
        None,
        "that the blocks may take, as far as a short measurement tells; None for any "
        "time",
        Amount("of seconds"),
    )
    timeout: float = option(
        7200.0, "seconds that a process waits for the others", Amount(positive=True)
    )
    overwrite: bool = option(
        False,
        "replace a quantized checkpoint or a recipe of another calibration; nothing "
        "else ever is",
        NoFlag(),
    )
    description: Optional[Mapping[str, Any]] = option(
        None,
        "more for the recipe's :attr:`~torchao_masquant.Recipe.description` and the "
        "checkpoint, such as the name of the data",
        NoFlag(),
    )
