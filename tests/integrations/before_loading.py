# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""All that is looked at of a checkpoint before a weight is loaded, without the loading."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import format_1
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping

from torchao_masquant import MASQuantHfConfig
from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer


@cache
def _empty() -> Any:
    config = AutoConfig.from_pretrained(format_1.FOLDER)
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def look_at(folder: Path) -> None:
    """Of a folder that holds the model of ``format_1``, perhaps damaged."""
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantizer = MASQuantHfQuantizer(
        MASQuantHfConfig.from_dict(entry), pre_quantized=True
    )
    empty = copy.deepcopy(_empty())
    files = [str(folder / "model.safetensors")]
    quantizer._process_model_before_weight_loading(empty, files)
    get_model_conversion_mapping(empty, None, quantizer)
