# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The packaged checkpoints."""

from pathlib import Path

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

DATA = Path(__file__).parent / "data"
VARIANTS: tuple[str, ...] = ("plain", "outliers")


def checkpoint_path(variant: str = "outliers") -> Path:
    """Folder of a packaged checkpoint, as ``from_pretrained`` takes it.

    Args:
        variant: "plain" is the model as trained. "outliers" continues from it with
            large constants on four channels of all image and sound tokens, put there on
            purpose: multimodal LLMs of usual size have such channels, this small one
            does not grow them by itself.

    Raises:
        ValueError: There is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: expected one of {VARIANTS}")
    return DATA / variant


def load_model(
    variant: str = "outliers", dtype: torch.dtype = torch.float32
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A packaged checkpoint in evaluation mode, on the CPU.

    Args:
        variant: "plain" or "outliers", see :func:`checkpoint_path`.
        dtype: Data type of the parameters; they are stored in bfloat16.
    """
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        checkpoint_path(variant), dtype=dtype
    )
    return model.eval()
