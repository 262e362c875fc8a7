# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The thinker of a Qwen2.5-Omni as a model by itself.

vLLM knows the whole model's class alone, which runs its thinker. Folders of the thinker are
saved by those who have loaded that class of transformers.
"""

from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerDummyInputsBuilder,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerMultiModalProcessor,
    Qwen2_5OmniThinkerProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

__all__ = ["OmniThinker"]


class _ProcessingInfo(Qwen2_5OmniThinkerProcessingInfo):
    def get_hf_config(self) -> Qwen2_5OmniThinkerConfig:
        return self.ctx.get_hf_config(Qwen2_5OmniThinkerConfig)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5OmniThinkerMultiModalProcessor,
    info=_ProcessingInfo,
    dummy_inputs=Qwen2_5OmniThinkerDummyInputsBuilder,
)
class OmniThinker(Qwen2_5OmniThinkerForConditionalGeneration):
    """vLLM's, whose config and whose tensors are not below a name of the thinker's."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        whole = Qwen2_5OmniConfig()
        whole.thinker_config = vllm_config.model_config.hf_config
        super().__init__(
            vllm_config=vllm_config.with_hf_config(whole, []), prefix=prefix
        )
